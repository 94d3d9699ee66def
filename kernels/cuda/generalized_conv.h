// The per-head shift of generalized convolution on NVIDIA GPUs (Bootstrapping ViTs, Eq. 3-4). No torch.
#pragma once

#include "../common/generalized_conv_params.h"

namespace fastib {

// Elements of 2 or 4 bytes. Pointers are on the current device; the work is queued on `stream` (a cudaStream_t).
// Returns what went wrong, null where nothing did.
const char* generalized_conv_shift_cuda(const GeneralizedConvShiftParams& params, void* stream);

}  // namespace fastib
