// Launches the bodies of involution for one element type.
#pragma once

#include <cuda_runtime.h>

#include "involution_plan.h"

namespace fastib::involution_cuda {

template <typename Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocks)
    body_kernel(const __grid_constant__ typename Body::Params params) {
  Body::run(params, blockIdx.x, threadIdx.x);
}

// Queues bodies on a stream until one fails.
struct Launcher {
  cudaStream_t stream;
  cudaError_t status = cudaSuccess;

  template <typename Body>
  void operator()(Body, const typename Body::Params& params) {
    if (status != cudaSuccess) return;
    const int64_t blocks = (Body::threads(params) + kThreads - 1) / kThreads;
    if (blocks > INT32_MAX) {
      status = cudaErrorInvalidConfiguration;
      return;
    }
    body_kernel<Body><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
    status = cudaGetLastError();
  }

  const char* answer() const { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }
};

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
