// Involution on the CPU (Li et al. 2021): a K x K kernel of its own for every place and group of channels.
//
// A unit of work is a band of rows of one (image, group) pair. Units are independent: the caller may split
// [0, involution_units) as it likes and the result does not depend on the split.
#pragma once

#include <cstdint>

#include "../common/inline.h"
#include "../common/involution_params.h"

namespace fastib {

// Bands that the rows of one pair are cut into, so that what one band needs of x stays in the second cache. Where the
// taps are dense, neighbouring groups share lines of the cache: those of a band stay there until the next group's turn.
FASTIB_INLINE int64_t involution_bands(const InvolutionParams& p) {
  const int64_t halo = (p.K - 1) * p.dilation, row_bytes = 4 * (p.C / p.G) * (p.Wi + halo);
  const int64_t wanted = 160 * 1024 / row_bytes - halo, least = halo > 4 ? halo : 4;
  int64_t rows = (wanted > least ? wanted : least) / p.stride + 1;
  if (p.channels_last) {
    const int64_t shared = (1 << 20) / (8 * p.G * p.K * p.K * p.Wo), most = shared > least ? shared : least;
    rows = rows < most ? rows : most;
  }
  return (p.Ho + rows - 1) / rows;
}

FASTIB_INLINE int64_t involution_units(const InvolutionParams& p) { return p.B * p.G * involution_bands(p); }

void involution_forward(const InvolutionParams& params, int64_t begin, int64_t end);
void involution_backward(const InvolutionGradParams& params, int64_t begin, int64_t end);

}  // namespace fastib
