// Involution on NVIDIA GPUs (Li et al. 2021). No torch, no atomics: two runs agree bit for bit.
#pragma once

#include "../common/involution_params.h"

namespace fastib {

// float32, bfloat16 or float16. Pointers are on the current device; the work is queued on `stream` (a cudaStream_t).
// Returns what went wrong, null where nothing did.
const char* involution_forward_cuda(const InvolutionParams& params, void* stream);
const char* involution_backward_cuda(const InvolutionGradParams& params, void* stream);

}  // namespace fastib
