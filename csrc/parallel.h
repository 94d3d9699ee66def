// Loops over all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastib {

// Calls f(begin, end) on as many equal parts of [0, n) as there are threads.
template <typename F>
void in_parallel(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, f);
}

// The same on eight parts a thread, which takes the next one when it is done with one, so that a thread that wakes late
// or is interrupted holds up the others by a part at most. For kernels that memory bounds: those that keep things from
// unit to unit lose more than this gains.
template <typename F>
void in_parts(int64_t n, const F& f) {
  constexpr int64_t kPerThread = 8;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n);
  const int64_t part = std::max<int64_t>(1, n / std::max<int64_t>(1, threads * kPerThread));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(part, std::memory_order_relaxed)) < n;)
      f(begin, std::min(begin + part, n));
  });
}

}  // namespace fastib
