// Launches bodies (tile.h) as kernels.
#pragma once

#include <cuda_runtime.h>

#include "tile.h"

namespace fastib {

template <typename Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocks)
    body_kernel(const __grid_constant__ typename Body::Params params) {
  if constexpr (kShares<Body>) {
    extern __shared__ __align__(16) uint32_t shared[];
    Body::stage(params, blockIdx.x, threadIdx.x, shared);
    __syncthreads();
    Body::run(params, blockIdx.x, threadIdx.x, shared);
    __syncthreads();
    Body::flush(params, blockIdx.x, threadIdx.x, shared);
  } else {
    Body::run(params, blockIdx.x, threadIdx.x);
  }
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
    int bytes = 0;
    if constexpr (kShares<Body>) {
      bytes = static_cast<int>(Body::shared_bytes(params));
      status = cudaFuncSetAttribute(body_kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (status != cudaSuccess) return;
    }
    body_kernel<Body><<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(params);
    status = cudaGetLastError();
  }

  const char* answer() const { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }
};

}  // namespace fastib
