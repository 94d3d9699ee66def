// Runs the CUDA bodies of involution on the host, thread by thread and block by block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../kernels/cuda/involution_plan.h"

namespace fastib {

// Runs every body that it is given, whole blocks of it, and keeps their names.
struct OnHost {
  std::string names;

  template <typename Body>
  void operator()(Body, const typename Body::Params& params) {
    const int64_t threads = Body::threads(params), step = kThreads;
    for (int64_t block = 0; block * step < threads; ++block) {
      const auto each = [&](auto&& step_of) {
        for (int thread = 0; thread < step; ++thread) step_of(thread);
      };
      if constexpr (kShares<Body>) {
        std::vector<uint32_t> shared(Body::shared_bytes(params) / 4, 0xFFFFFFFFu);  // NaN in every type
        each([&](int thread) { Body::stage(params, block, thread, shared.data()); });
        each([&](int thread) { Body::run(params, block, thread, shared.data()); });
        each([&](int thread) { Body::flush(params, block, thread, shared.data()); });
      } else {
        each([&](int thread) { Body::run(params, block, thread); });
      }
    }
    names += std::string(__PRETTY_FUNCTION__) + "\n";
  }
};

template <typename Params>
std::string on_host(DType dtype, const Params& params) {
  OnHost host;
  const auto run = [&](auto element) {
    using E = decltype(element);
    if constexpr (std::is_same_v<Params, InvolutionParams>)
      involution_cuda::forward<E>(params, host);
    else
      involution_cuda::backward<E>(params, host);
  };
  if (dtype == DType::float32) run(float{});
  if (dtype == DType::bfloat16) run(bfloat16{});
  if (dtype == DType::float16) run(float16{});
  return host.names;
}

}  // namespace fastib
