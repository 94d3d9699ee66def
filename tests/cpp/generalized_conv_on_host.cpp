// The CUDA bodies of the per-head shift behind a C function, for tests in Python: run thread by thread on the host.
#include <cstring>
#include <string>

#include "../../kernels/cuda/generalized_conv_bodies.h"

using namespace fastib;

// sizes: element size, channels_last, inverse, B, H, D, rows, columns. strides: of x, then of out. name: of the body
// that ran, at most `room` bytes.
extern "C" void generalized_conv_on_host(const int64_t* sizes, const void* x, void* out, const int64_t* strides,
                                         char* name, int64_t room) {
  GeneralizedConvShiftParams p{};
  p.element_size = sizes[0], p.channels_last = sizes[1], p.inverse = sizes[2];
  p.B = sizes[3], p.H = sizes[4], p.D = sizes[5], p.rows = sizes[6], p.columns = sizes[7];
  p.x = x, p.out = out;
  std::memcpy(p.x_stride, strides, sizeof(p.x_stride));
  std::memcpy(p.out_stride, strides + 4, sizeof(p.out_stride));
  const auto run = [&](auto body, const GeneralizedConvShiftParams& params) {
    using Body = decltype(body);
    const int64_t threads = Body::threads(params);
    for (int64_t block = 0; block * kThreads < threads; ++block)
      for (int thread = 0; thread < kThreads; ++thread) Body::run(params, block, thread);
    std::strncpy(name, __PRETTY_FUNCTION__, room - 1);
  };
  if (p.element_size == 4) generalized_conv_cuda::shift<uint32_t>(p, run);
  if (p.element_size == 2) generalized_conv_cuda::shift<uint16_t>(p, run);
}
