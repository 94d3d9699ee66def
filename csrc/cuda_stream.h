// The device and the current stream of a CUDA tensor. The function that knows the stream is in torch's CUDA library,
// which this library does not link, so that it loads in a torch without CUDA too.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "error_code.h"

namespace fastib {

// Makes the tensor's device the current one while it lives.
class CudaDevice {
 public:
  explicit CudaDevice(const torch::stable::Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  void* stream() const {
    using CurrentStream = AOTITorchError (*)(int32_t, void**);
    static const CurrentStream current = find<CurrentStream>("aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(current, "torch's CUDA library is not loaded");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current(index_, &stream));
    return stream;
  }

 private:
  template <typename F>
  static F find(const char* name) {
    if (void* f = dlsym(RTLD_DEFAULT, name)) return reinterpret_cast<F>(f);
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<F>(torch_cuda ? dlsym(torch_cuda, name) : nullptr);
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastib
