// Launches bodies (tile.h) as kernels.
#pragma once

#include <cuda_runtime.h>

#include "tile.h"

namespace fastib {

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

}  // namespace fastib
