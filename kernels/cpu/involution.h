// Involution on the CPU (Li et al. 2021): a K x K kernel of its own for every place and group of channels.
//
// A unit of work is a band of rows of one group of an image, or of a few neighbouring groups. Units are independent:
// the caller may split [0, involution_units) as it likes and the result does not depend on the split.
#pragma once

#include <cstdint>

#include "../common/inline.h"
#include "../common/involution_params.h"

namespace fastib {

// Groups that one unit takes: one where the columns are dense. Where the taps are, neighbouring groups share lines of
// the cache: as many as make up a dozen lines, unless what a few rows need of x would leave the second cache.
FASTIB_INLINE int64_t involution_groups(const InvolutionParams& p) {
  if (!p.channels_last) return 1;
  const int64_t halo = (p.K - 1) * p.dilation, row_bytes = 4 * (p.C / p.G) * (p.Wi + halo);
  const int64_t fit = (512 << 10) / (row_bytes * (2 * halo + p.stride)) + 1, wanted = 191 / (p.K * p.K) + 1;
  const int64_t most = fit < wanted ? fit : wanted;
  return p.G < most ? p.G : most;
}

// Bands that the rows of one unit's groups are cut into, so that what a band needs of x stays in the second cache, and
// that a small batch is work for 16 threads.
FASTIB_INLINE int64_t involution_bands(const InvolutionParams& p) {
  const int64_t halo = (p.K - 1) * p.dilation, groups = involution_groups(p);
  const int64_t row_bytes = 4 * groups * (p.C / p.G) * (p.Wi + halo), parts = (p.G + groups - 1) / groups;
  const int64_t held = ((p.channels_last ? 240 : 160) * 1024 / row_bytes - halo) / p.stride,
                share = p.B * parts * p.Ho / 16;
  const int64_t wanted = held < share ? held : share, least = (halo > 4 ? halo : 4) / p.stride;
  const int64_t rows = (wanted > least ? wanted : least) + 1;
  return (p.Ho + rows - 1) / rows;
}

FASTIB_INLINE int64_t involution_units(const InvolutionParams& p) {
  const int64_t groups = involution_groups(p);
  return p.B * ((p.G + groups - 1) / groups) * involution_bands(p);
}

void involution_forward(const InvolutionParams& params, int64_t begin, int64_t end);
void involution_backward(const InvolutionGradParams& params, int64_t begin, int64_t end);

}  // namespace fastib
