#include "generalized_conv.h"

#include "generalized_conv_bodies.h"
#include "launch.cuh"

namespace fastib {

const char* generalized_conv_shift_cuda(const GeneralizedConvShiftParams& params, void* stream) {
  Launcher launcher{static_cast<cudaStream_t>(stream)};
  if (params.element_size == 4)
    generalized_conv_cuda::shift<uint32_t>(params, launcher);
  else if (params.element_size == 2)
    generalized_conv_cuda::shift<uint16_t>(params, launcher);
  else
    return "elements must have 2 or 4 bytes";
  return launcher.answer();
}

}  // namespace fastib
