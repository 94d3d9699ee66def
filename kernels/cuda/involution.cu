#include "involution.h"

#include "involution_launch.cuh"

FASTIB_INVOLUTION_OF(float)

namespace fastib {

const char* involution_forward_cuda(const InvolutionParams& params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::float32:
      return involution_cuda::forward_of<float>(params, queue);
    case DType::bfloat16:
      return involution_cuda::forward_of<bfloat16>(params, queue);
    case DType::float16:
      return involution_cuda::forward_of<float16>(params, queue);
    case DType::float64:
      break;
  }
  return "there is no float64 kernel";
}

const char* involution_backward_cuda(const InvolutionGradParams& params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (params.forward.dtype) {
    case DType::float32:
      return involution_cuda::backward_of<float>(params, queue);
    case DType::bfloat16:
      return involution_cuda::backward_of<bfloat16>(params, queue);
    case DType::float16:
      return involution_cuda::backward_of<float16>(params, queue);
    case DType::float64:
      break;
  }
  return "there is no float64 kernel";
}

}  // namespace fastib
