// The per-head shift of generalized convolution on the CPU (Bootstrapping ViTs, Eq. 3-4).
//
// A unit of work is a row of pixels where channels are dense, and a channel of an image where columns are. Units are
// independent: the result does not depend on how [0, generalized_conv_units) is split.
#pragma once

#include "../common/generalized_conv_params.h"

namespace fastib {

FASTIB_INLINE int64_t generalized_conv_units(const GeneralizedConvShiftParams& p) {
  return p.B * (p.channels_last ? p.rows : p.H * p.D);
}

void generalized_conv_shift(const GeneralizedConvShiftParams& params, int64_t begin, int64_t end);

}  // namespace fastib
