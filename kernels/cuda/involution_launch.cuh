// Launches the bodies of involution for one element type.
#pragma once

#include "involution_plan.h"
#include "launch.cuh"

namespace fastib::involution_cuda {

// One per element type, each in a file of its own so that they compile side by side.
template <typename E>
const char* forward_of(const InvolutionParams& params, cudaStream_t stream);
template <typename E>
const char* backward_of(const InvolutionGradParams& params, cudaStream_t stream);

}  // namespace fastib::involution_cuda

#define FASTIB_INVOLUTION_OF(E)                                                         \
  namespace fastib::involution_cuda {                                                   \
  template <>                                                                           \
  const char* forward_of<E>(const InvolutionParams& params, cudaStream_t stream) {      \
    Launcher launcher{stream};                                                          \
    forward<E>(params, launcher);                                                       \
    return launcher.answer();                                                           \
  }                                                                                     \
  template <>                                                                           \
  const char* backward_of<E>(const InvolutionGradParams& params, cudaStream_t stream) { \
    Launcher launcher{stream};                                                          \
    backward<E>(params, launcher);                                                      \
    return launcher.answer();                                                           \
  }                                                                                     \
  }
