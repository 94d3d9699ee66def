// Multi-head convolutional attention (DearKD, Sec. 3.1) as plain loops in double: the oracle of the C++ tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../kernels/common/philox.h"

struct NaiveMhca {
  int64_t B, H, N, D, grid_h, grid_w, num_prefix_tokens;
  double scale, rpe_dropout, attn_dropout;
  uint64_t seed;
  std::vector<double> q, k, v, grad_out;  // (B, H, N, D)
  std::vector<double> alpha, center;      // (H,), (H, 2)
  std::vector<double> out, stats, grad_q, grad_k, grad_v, grad_alpha, grad_center;
  double grad_alpha_terms = 0, grad_center_terms = 0;  // largest sum of absolute terms: what rounding errors scale with

  int64_t at(int64_t b, int64_t h, int64_t n) const { return ((b * H + h) * N + n) * D; }

  // Factor of an element under dropout: 1 / (1 - p) or 0.
  double keep(double p, uint32_t stream, int64_t element) const {
    if (p == 0) return 1;
    return fastib::dropout_keep(seed, stream, element, fastib::dropout_threshold(p)) ? fastib::dropout_scale(p) : 0;
  }

  void run() {
    const int64_t total = B * H * N * D;
    for (auto* x : {&out, &grad_q, &grad_k, &grad_v}) x->assign(total, 0);
    stats.assign(2 * B * H * N, 0), grad_alpha.assign(H, 0), grad_center.assign(2 * H, 0);
    std::vector<double> p(N), grad_p(N), factor(N), position_keep(N), dy(N), dx(N);
    std::vector<double> alpha_terms(H), center_terms(H);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t i = 0; i < N; ++i) {
          double max = -INFINITY, sum = 0;
          for (int64_t j = 0; j < N; ++j) {
            const int64_t from = i - num_prefix_tokens, to = j - num_prefix_tokens;
            const bool patches = from >= 0 && to >= 0;
            dy[j] = patches ? to / grid_w - from / grid_w : 0;
            dx[j] = patches ? to % grid_w - from % grid_w : 0;
            position_keep[j] = keep(rpe_dropout, fastib::kRpeDropoutStream, (h * N + i) * N + j);
            const double bias =
                -alpha[h] * (dy[j] * dy[j] + dx[j] * dx[j] - 2 * (center[2 * h] * dy[j] + center[2 * h + 1] * dx[j]));
            double dot = 0;
            for (int64_t d = 0; d < D; ++d) dot += q[at(b, h, i) + d] * k[at(b, h, j) + d];
            p[j] = scale * dot + position_keep[j] * bias;
            max = std::max(max, p[j]);
          }
          for (int64_t j = 0; j < N; ++j) sum += std::exp(p[j] - max);
          stats[2 * (b * H + h) * N + i] = max / std::log(2.0);
          stats[(2 * (b * H + h) + 1) * N + i] = sum;
          double delta = 0;
          for (int64_t j = 0; j < N; ++j) {
            p[j] = std::exp(p[j] - max) / sum;
            factor[j] = keep(attn_dropout, fastib::kAttnDropoutStream, ((b * H + h) * N + i) * N + j);
            double dot = 0;
            for (int64_t d = 0; d < D; ++d) {
              out[at(b, h, i) + d] += p[j] * factor[j] * v[at(b, h, j) + d];
              grad_v[at(b, h, j) + d] += p[j] * factor[j] * grad_out[at(b, h, i) + d];
              dot += grad_out[at(b, h, i) + d] * v[at(b, h, j) + d];
            }
            grad_p[j] = factor[j] * dot;
            delta += p[j] * grad_p[j];
          }
          for (int64_t j = 0; j < N; ++j) {
            const double grad_s = p[j] * (grad_p[j] - delta);
            for (int64_t d = 0; d < D; ++d) {
              grad_q[at(b, h, i) + d] += scale * grad_s * k[at(b, h, j) + d];
              grad_k[at(b, h, j) + d] += scale * grad_s * q[at(b, h, i) + d];
            }
            const double grad_bias = grad_s * position_keep[j];
            const double form = dy[j] * dy[j] + dx[j] * dx[j] - 2 * (center[2 * h] * dy[j] + center[2 * h + 1] * dx[j]);
            grad_alpha[h] -= grad_bias * form;
            grad_center[2 * h] += grad_bias * 2 * alpha[h] * dy[j];
            grad_center[2 * h + 1] += grad_bias * 2 * alpha[h] * dx[j];
            alpha_terms[h] += std::abs(grad_bias * form);
            center_terms[h] += std::abs(grad_bias * 2 * alpha[h]) * (std::abs(dy[j]) + std::abs(dx[j]));
          }
        }
      }
    }
    for (double terms : alpha_terms) grad_alpha_terms = std::max(grad_alpha_terms, terms);
    for (double terms : center_terms) grad_center_terms = std::max(grad_center_terms, terms);
  }
};
