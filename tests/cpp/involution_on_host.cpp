// The CUDA bodies of involution behind a C function, for tests in Python.
#include "involution_bodies.h"

#include <algorithm>
#include <cstring>

using namespace fastib;

// sizes: dtype, channels_last, B, C, G, K, Hi, Wi, Ho, Wo, stride, dilation. pointers and strides, one after the other:
// x, weight, out, or x, weight, grad_out, grad_x, grad_weight. names: of the bodies that ran, at most `room` bytes.
extern "C" void involution_on_host(bool backward, const int64_t* sizes, void* const* pointers, const int64_t* strides,
                                   char* names, int64_t room) {
  InvolutionGradParams g{};
  InvolutionParams& p = g.forward;
  p.dtype = static_cast<DType>(sizes[0]), p.channels_last = sizes[1];
  int64_t* const fields[] = {&p.B, &p.C, &p.G, &p.K, &p.Hi, &p.Wi, &p.Ho, &p.Wo, &p.stride, &p.dilation};
  for (int i = 0; i < 10; ++i) *fields[i] = sizes[2 + i];
  const auto take = [&](int64_t* to, int n) { std::copy_n(strides, n, to), strides += n; };
  p.x = pointers[0], p.weight = pointers[1];
  take(p.x_stride, 4), take(p.weight_stride, 6);
  std::string ran;
  if (backward) {
    g.grad_out = pointers[2], g.grad_x = pointers[3], g.grad_weight = pointers[4];
    take(g.grad_out_stride, 4), take(g.grad_x_stride, 4), take(g.grad_weight_stride, 6);
    ran = on_host(p.dtype, g);
  } else {
    p.out = pointers[2];
    take(p.out_stride, 4);
    ran = on_host(p.dtype, p);
  }
  std::strncpy(names, ran.c_str(), room - 1);
}
