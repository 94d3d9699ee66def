// fastib._kernels: the torch-free kernels on NumPy arrays, for tests and for use without torch, and build_info().
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/common/philox.h"
#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/mhca_attention.h"

namespace py = pybind11;

namespace fastib {
namespace {

// bfloat16, which NumPy does not have, travels as uint16.
DType kernel_dtype(const py::array& x) {
  switch (x.dtype().char_()) {
    case 'f':
      return DType::float32;
    case 'd':
      return DType::float64;
    case 'e':
      return DType::float16;
    case 'H':
      return DType::bfloat16;
    default:
      throw py::value_error("q must be float32, float64, float16 or uint16 (the bits of bfloat16)");
  }
}

py::array dense(const py::array& x, const py::dtype& dtype, const std::vector<py::ssize_t>& shape, const char* name) {
  if (!x.dtype().equal(dtype)) throw py::value_error(std::string(name) + " has the wrong dtype");
  if (!std::equal(shape.begin(), shape.end(), x.shape(), x.shape() + x.ndim())) {
    throw py::value_error(std::string(name) + " has the wrong shape");
  }
  return py::array::ensure(x, py::array::c_style);
}

void set_strides(int64_t (&strides)[3], const MhcaAttentionParams& p) {
  strides[0] = p.H * p.N * p.D, strides[1] = p.N * p.D, strides[2] = p.D;
}

// One attention problem on dense arrays, which it keeps alive.
struct Problem {
  py::array q, k, v, alpha, center;
  std::vector<py::ssize_t> shape;
  py::dtype dtype, sum_dtype;
  MhcaAttentionParams params{};

  Problem(const py::array& q_in, const py::array& k_in, const py::array& v_in, const py::array& alpha_in,
          const py::array& center_in, int64_t grid_h, int64_t grid_w, int64_t num_prefix_tokens, double scale,
          double rpe_dropout, double attn_dropout, uint64_t seed)
      : shape(q_in.shape(), q_in.shape() + q_in.ndim()), dtype(q_in.dtype()) {
    if (q_in.ndim() != 4) throw py::value_error("q must have shape (B, H, N, D)");
    params.dtype = kernel_dtype(q_in);
    sum_dtype = params.dtype == DType::float64 ? py::dtype::of<double>() : py::dtype::of<float>();
    params.B = shape[0], params.H = shape[1], params.N = shape[2], params.D = shape[3];
    if (q_in.size() == 0) throw py::value_error("q must not be empty");
    if (grid_h < 1 || grid_w < 1 || num_prefix_tokens < 0 || grid_h > params.N || grid_w > params.N ||
        params.N != num_prefix_tokens + grid_h * grid_w) {
      throw py::value_error("q must have num_prefix_tokens + grid_h * grid_w tokens");
    }
    if (!(rpe_dropout >= 0 && rpe_dropout <= 1 && attn_dropout >= 0 && attn_dropout <= 1)) {
      throw py::value_error("dropout probabilities must be in [0, 1]");
    }
    q = dense(q_in, dtype, shape, "q"), k = dense(k_in, dtype, shape, "k"), v = dense(v_in, dtype, shape, "v");
    alpha = dense(alpha_in, sum_dtype, {shape[1]}, "alpha");
    center = dense(center_in, sum_dtype, {shape[1], 2}, "center");
    params.grid_h = grid_h, params.grid_w = grid_w, params.num_prefix_tokens = num_prefix_tokens;
    params.q = q.data(), params.k = k.data(), params.v = v.data();
    params.alpha = alpha.data(), params.center = center.data();
    set_strides(params.q_stride, params), set_strides(params.k_stride, params), set_strides(params.v_stride, params);
    set_strides(params.out_stride, params);
    params.scale = scale, params.rpe_dropout = rpe_dropout, params.attn_dropout = attn_dropout, params.seed = seed;
  }
};

py::tuple forward(Problem problem) {
  MhcaAttentionParams& params = problem.params;
  py::array out(problem.dtype, problem.shape);
  py::array stats(problem.sum_dtype, std::vector<py::ssize_t>{problem.shape[0], problem.shape[1], 2, problem.shape[2]});
  params.out = out.mutable_data(), params.stats = stats.mutable_data();
  {
    py::gil_scoped_release release;
    mhca_attention_forward(params, 0, params.B * params.H);
  }
  return py::make_tuple(out, stats);
}

py::tuple backward(Problem problem, const py::array& grad_out_in, const py::array& out_in, const py::array& stats_in) {
  MhcaAttentionGradParams params{};
  params.forward = problem.params;
  const auto& shape = problem.shape;
  const py::array grad_out = dense(grad_out_in, problem.dtype, shape, "grad_out");
  const py::array out = dense(out_in, problem.dtype, shape, "out");
  const py::array stats = dense(stats_in, problem.sum_dtype, {shape[0], shape[1], 2, shape[2]}, "stats");
  py::array grad_q(problem.dtype, shape), grad_k(problem.dtype, shape), grad_v(problem.dtype, shape);
  py::array grad_alpha(problem.sum_dtype, std::vector<py::ssize_t>{shape[1]});
  py::array grad_center(problem.sum_dtype, std::vector<py::ssize_t>{shape[1], 2});
  std::vector<double> grad_position(params.forward.B * params.forward.H * 3);
  params.forward.out = const_cast<void*>(out.data()), params.forward.stats = const_cast<void*>(stats.data());
  params.grad_out = grad_out.data();
  params.grad_q = grad_q.mutable_data(), params.grad_k = grad_k.mutable_data(), params.grad_v = grad_v.mutable_data();
  params.grad_position = grad_position.data();
  set_strides(params.grad_out_stride, params.forward), set_strides(params.grad_q_stride, params.forward);
  set_strides(params.grad_k_stride, params.forward), set_strides(params.grad_v_stride, params.forward);
  void *alpha_data = grad_alpha.mutable_data(), *center_data = grad_center.mutable_data();
  {
    py::gil_scoped_release release;
    mhca_attention_backward(params, 0, params.forward.B * params.forward.H);
    mhca_attention_reduce_position(params, alpha_data, center_data);
  }
  return py::make_tuple(grad_q, grad_k, grad_v, grad_alpha, grad_center);
}

py::array_t<bool> keep_mask(uint64_t seed, uint32_t stream, py::ssize_t count, double p) {
  py::array_t<bool> mask(count);
  const uint32_t threshold = dropout_threshold(p);
  bool* data = mask.mutable_data();
  for (py::ssize_t i = 0; i < count; ++i) data[i] = dropout_keep(seed, stream, static_cast<uint64_t>(i), threshold);
  return mask;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTIB_COMPILER;
  info["flags"] = FASTIB_FLAGS;
  info["cuda_compiler"] = FASTIB_CUDA_COMPILER;
  info["cuda_archs"] = py::str(FASTIB_CUDA_ARCHS).attr("split")();
  info["cpu_isas_compiled"] = py::str(FASTIB_ISAS).attr("split")();
  info["cpu_isas_supported"] = cpu_isas();
  info["cpu_isa"] = cpu_isa();
  return info;
}

}  // namespace
}  // namespace fastib

PYBIND11_MODULE(_kernels, m) {
  using namespace fastib;
  using py::arg;
  m.doc() = "The CPU kernels of fastib on NumPy arrays, one thread, and how they were built.";
  m.def("build_info", &build_info, "Compiler, flags, CUDA architectures and CPU instruction sets of this build.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets compiled in that this machine runs, slowest first.");
  m.def("cpu_isa", &cpu_isa, "The instruction set in use, by the operators of torch too.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (!set_cpu_isa(name)) throw py::value_error("name must be one of cpu_isas(), but is " + name);
      },
      arg("name"), "Forces an instruction set for the whole process.");
  m.def("keep_mask", &keep_mask, arg("seed"), arg("stream"), arg("count"), arg("p"),
        "Dropout mask of elements 0 ... count - 1.");
  py::class_<Problem>(m, "MhcaAttention", "Multi-head convolutional attention on dense arrays (B, H, N, D).")
      .def(py::init<py::array, py::array, py::array, py::array, py::array, int64_t, int64_t, int64_t, double, double,
                    double, uint64_t>(),
           arg("q"), arg("k"), arg("v"), arg("alpha"), arg("center"), arg("grid_h"), arg("grid_w"),
           arg("num_prefix_tokens"), arg("scale"), arg("rpe_dropout") = 0.0, arg("attn_dropout") = 0.0, arg("seed") = 0)
      .def("forward", &forward, "(out, stats)")
      .def("backward", &backward, arg("grad_out"), arg("out"), arg("stats"),
           "(grad_q, grad_k, grad_v, grad_alpha, grad_center)");
}
