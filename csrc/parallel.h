// Work for all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace fastib {

template <typename F>
void in_parallel(int64_t n, const F& f) {
  const char* s = getenv("FASTIB_PARTS");
  const int64_t kParts = s ? atoi(s) : 1;
  const int64_t threads = torch::stable::get_num_threads();
  if (kParts == 1) { torch::stable::parallel_for(0, n, 1, f); return; }
  const int64_t part = std::max<int64_t>(1, n / (threads * kParts));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, n), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(part, std::memory_order_relaxed)) < n;)
      f(begin, std::min(begin + part, n));
  });
}

}  // namespace fastib
