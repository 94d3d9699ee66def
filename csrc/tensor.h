// What bindings share: checks of tensors that come from outside, and allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/common/dtype.h"
#include "error_code.h"

namespace fastib {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes.data()[i]);
  return text + ")";
}

inline DType kernel_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, but has scalar type ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

// float32, and float64 for float64: the type of sums, parameters and losses.
inline ScalarType accumulation_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Strided with `shape` and `dtype`, and backed by storage over its whole extent.
inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.defined(), name, " must be a tensor");
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided, name, " must be a strided tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", but is ",
                  torch::headeronly::toString(t.scalar_type()));
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  STD_TORCH_CHECK(same, name, " must have shape ", shape_text(shape), ", but has ", shape_text(sizes));
  if (t.numel() == 0) return;
  const auto strides = t.strides();
  int64_t last = t.storage_offset(), bytes = 0;
  for (size_t i = 0; i < shape.size(); ++i) last += (shape[i] - 1) * strides[i];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK((last + 1) * static_cast<int64_t>(t.element_size()) <= bytes, name, " reaches beyond its storage of ",
                  bytes, " bytes");
}

inline void check_cpu_tensor(const Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.defined(), name, " must be a tensor");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, as the other inputs are");
  check_tensor(t, name, dtype, shape);
}

// The one-element int64 seed; 0 where no dropout is asked for.
inline uint64_t read_seed(const std::optional<Tensor>& seed, bool needed) {
  if (!needed) return 0;
  STD_TORCH_CHECK(seed.has_value(), "seed must be given where a dropout probability is above 0");
  STD_TORCH_CHECK(seed->numel() == 1, "seed must have one element, but has shape ", shape_text(seed->sizes()));
  check_cpu_tensor(*seed, "seed", ScalarType::Long, std::vector<int64_t>(seed->sizes().begin(), seed->sizes().end()));
  return static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

inline void check_probability(double p, const char* name) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, name, " must be in [0, 1], but is ", p);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t` with a dense last dimension: itself, or a copy.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

// Allocation through the C functions under torch::stable, which cost a quarter of a call through the dispatcher.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), shape.begin(), shape.size(), &type, nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

// A tensor of `sizes` whose memory is dense in the order of dimensions that `order` gives, outermost first.
inline Tensor empty_in_order(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int>& order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t i = order.size(); i-- > 0;)
    strides[order[i]] = elements, elements *= sizes[order[i]] ? sizes[order[i]] : 1;
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  const Tensor dense = new_empty(like, {count}, like.scalar_type());
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(dense.get(), sizes.size(), sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

// The two orders of a (B, C, rows, columns) image, and which of them `t` is in; an image in neither counts as the
// first.
inline const std::vector<int>& image_order(bool channels_last) {
  static const std::vector<int> kColumnsLast = {0, 1, 2, 3}, kChannelsLast = {0, 2, 3, 1};
  return channels_last ? kChannelsLast : kColumnsLast;
}
inline bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.stride(3) != 1; }

// A copy of `t` in that order.
inline Tensor copy_in_order(const Tensor& t, const std::vector<int>& order) {
  Tensor copy = empty_in_order(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), order);
  return torch::stable::copy_(copy, t);
}

// (B, H, N, D) laid out as a dense (B, N, H, D): what the projection after attention reads without a copy.
inline Tensor empty_heads_last(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D) {
  const Tensor dense = new_empty(like, {B, N, H, D}, like.scalar_type());
  const int64_t sizes[] = {B, H, N, D};
  const int64_t strides[] = {dense.stride(0), dense.stride(2), dense.stride(1), dense.stride(3)};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(dense.get(), 4, sizes, strides, 0, &handle));
  return Tensor(handle);
}

}  // namespace fastib
