"""involution: its numbers against the reference in float64, on every instruction set and on the GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, kernel_targets, on_device, value_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from involution_problem import LAYOUTS, NAMES, Problem, channels_last

from fastib.ops import involution
from fastib.reference import involution_ref

GPU = "cuda"
sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are no installed package
from benchmarks.memory import peak_extra_bytes  # noqa: E402


def test_the_reference_is_its_formula():
    """By hand, tap by tap, stride 2, dilation 2."""
    problem = Problem(2, 4, 2, 3, (6, 5), torch.float64, stride=2, dilation=2)
    x, weight = problem.inputs
    expected = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    for b, c, i, j, u, v in torch.cartesian_prod(*map(torch.arange, (2, 4, 3, 3, 3, 3))).tolist():
        row, column = 2 * i + 2 * (u - 1), 2 * j + 2 * (v - 1)
        if 0 <= row < 6 and 0 <= column < 5:
            expected[b, c, i, j] += weight[b, c // 2, u, v, i, j] * x[b, c, row, column]
    torch.testing.assert_close(involution_ref(x, weight, stride=2, dilation=2), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
def test_values_and_gradients(target, kernel, stride, dilation, dtype, layout):
    """Odd sizes at stride 2 included, at which the well-known kernel reads beyond its weights."""
    for size in ((13, 17), (8, 14)):
        problem = Problem(2, 32, 2, kernel, size, dtype, stride=stride, dilation=dilation, seed=kernel)
        x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
        problem.check(target, [x, weight], grad_out)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("channels", "size", "kernel", "stride"), [
    (32, (112, 112), 3, 1), (64, (56, 56), 7, 1), (64, (28, 28), 7, 2), (64, (14, 14), 7, 1), (64, (7, 7), 7, 1),
    (32, (15, 15), 7, 2),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layers_of_rednet(target, channels, size, kernel, stride, dtype, layout):
    problem = Problem(1, channels, channels // 16, kernel, size, dtype, stride=stride)
    x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
    problem.check(target, [x, weight], grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_larger_than_a_cache(target, stride, dtype):
    """Written past the caches, from rows of odd length that begin anywhere in a line."""
    Problem(3, 16, 16, 7, (67 * stride, 59 * stride), dtype, stride=stride).check(target)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (1, 1), (5, 5), (16, 16), (17, 1), (40, 2), (66, 2), (9, 3), (48, 3)]
)
def test_any_group_size(target, channels, groups, layout, dtype):
    """Three channels, one channel a group, groups that fill no vector."""
    for kernel, stride in ((7, 1), (3, 2)):
        problem = Problem(2, channels, groups, kernel, (9, 11), dtype, stride=stride)
        x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
        problem.check(target, [x, weight], grad_out)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (1, 40), (40, 1), (33, 65), (5, 224)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_awkward_sizes(target, size, layout, dtype):
    """Images smaller than the kernel, of one row or one column, wider than a tile."""
    for kernel, stride, dilation in ((7, 1, 1), (7, 2, 1), (5, 1, 2), (3, 3, 1), (3, 5, 4), (11, 1, 1), (13, 2, 3)):
        problem = Problem(2, 6, 2, kernel, size, dtype, stride=stride, dilation=dilation)
        x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
        problem.check(target, [x, weight], grad_out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(target, layout, dtype):
    """Slices, transposes, expanded tensors, gradients in any layout; the result has x's memory format."""
    for stride in (1, 2):
        problem = Problem(3, 32, 2, 7, (9, 10), dtype, stride=stride)
        x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
        problem.check(target, [x, weight], grad_out)
        out = involution(*(on_device(t, target.device) for t in (x, weight)), stride=stride, backend=target.backend)
        last = x.stride(1) == 1
        assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_gradients_of_a_sum_and_of_a_slice(target):
    """Gradients as autograd makes them: expanded scalars, transposes, strided slices. None has to be contiguous."""
    problem = Problem(2, 32, 2, 3, (8, 6), torch.float32)
    for of in (
        lambda y: y.sum(), lambda y: y.mean((2, 3)).sum(), lambda y: y[:, ::2, 1:, ::3].square().sum(),
        lambda y: y.transpose(1, 3).reshape(2, -1).sin().sum(), lambda y: y[0].sum(),
    ):  # fmt: skip
        ones = torch.ones(())
        ours = value_and_grads(
            lambda *t, of=of: of(involution(*t, backend=target.backend)),
            [t.to(target.device) for t in problem.inputs], ones.to(target.device),
        )  # fmt: skip
        exact = value_and_grads(
            lambda *t, of=of: of(involution_ref(*t)), [t.double() for t in problem.inputs], ones.double()
        )
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_of_zero(target, shape, stride):
    batch, channels, rows, columns = shape
    problem = Problem(batch, channels, 2, 3, (rows, columns), torch.float32, stride=stride)
    actual, exact = problem.kernel(target), problem.exact()
    for a, b in zip(actual, exact, strict=True):
        assert a.shape == b.shape and torch.equal(a.cpu().double(), b)
    if channels == 0:
        x, weight = (t.to(target.device) for t in problem.inputs)
        no_groups = involution(x, weight[:, :0], stride=stride, backend=target.backend)
        assert no_groups.shape == exact[0].shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uninitialised_memory_is_never_read(target, poisoned_memory, layout, dtype):
    """Results of torch are full of NaN before, and the kernels' own scratch after a call on NaN."""
    for stride in (1, 2):
        poison = Problem(2, 40, 2, 9, (30, 31), dtype, stride=stride)
        poison.inputs = [torch.full_like(t, torch.nan) for t in poison.inputs]
        poison.kernel(target, LAYOUTS[layout](*poison.inputs, poison.grad_out)[:2])
        problem = Problem(2, 24, 2, 7, (9, 8), dtype, stride=stride)
        x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
        problem.check(target, [x, weight], grad_out)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_where_they_belong(target, where, value, stride, dtype):
    """Not finite in gives not finite out where that element counts, and nowhere else."""
    problem = Problem(1, 32, 2, 3, (7, 8), dtype, stride=stride)
    tensors = [*problem.inputs, problem.grad_out]
    place = (0, 1, 2, 3) if tensors[where].dim() == 4 else (0, 1, 1, 2, 2, 2)
    tensors[where][place] = value
    for order in (lambda t: t, channels_last):
        x, weight, grad_out = map(order, tensors)
        actual, exact = problem.kernel(target, [x, weight], grad_out), problem.exact()
        for name, a, b in zip(NAMES, actual, exact, strict=True):
            assert torch.equal(a.cpu().isfinite(), b.to(dtype).isfinite()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_twice_and_with_any_thread_count(target, restored_threads, layout, dtype):
    """And for an image alone, in whatever batch it comes."""
    problem = Problem(5, 32, 2, 7, (41, 30), dtype)
    x, weight, grad_out = LAYOUTS[layout](*problem.inputs, problem.grad_out)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.kernel(target, [x, weight], grad_out))
    results.append([torch.cat(t) for t in zip(
        *(problem.kernel(target, [x[b : b + 1], weight[b : b + 1]], grad_out[b : b + 1]) for b in range(5)), strict=True
    )])  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"stride": 2, "dilation": 2}, {"stride": 3}])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(target, options, layout):
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    problem = Problem(2, 4, 2, 3, (4, 5), torch.float64, **options)
    x, weight, _ = LAYOUTS[layout](*problem.inputs, problem.grad_out)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: involution(*t, backend=target.backend, **options), inputs)


def test_only_some_gradients(target):
    problem = Problem(2, 32, 2, 3, (6, 6), torch.float32)
    _, *grads = problem.kernel(target)
    for index, expected in enumerate(grads):
        inputs = [t.to(target.device) for t in problem.inputs]
        inputs[index] = inputs[index].requires_grad_()
        involution(*inputs, backend=target.backend).backward(problem.grad_out.to(target.device))
        assert torch.equal(inputs[index].grad, expected)


def test_no_new_code_for_a_new_shape(target, monkeypatch):
    """Nothing is compiled at run time, and no package is asked for that compiles."""

    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    for batch in (1, 2, 3):
        for side in range(5, 15):
            Problem(batch, 16, 1, 3, (side, side + batch), torch.float32).kernel(target)
    assert "cupy" not in sys.modules


def test_memory_of_a_224_pixel_batch(target):
    """What unfolding spends tens of gigabytes on: a stem at 224 pixels takes its results and no more."""
    if target.device == "cuda":
        pytest.skip("the profiler counts the host's memory")
    problem = Problem(2, 32, 2, 7, (224, 224), torch.float32)
    inputs = [t.requires_grad_() for t in problem.inputs]

    def step():
        out = involution(*inputs, backend=target.backend)
        return out.detach(), *torch.autograd.grad(out, inputs, problem.grad_out)

    results = sum(t.numel() * t.element_size() for t in (problem.grad_out, *inputs))
    assert peak_extra_bytes(step, "cpu") <= results + 2**16


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("where", kernel_targets(GPU), ids=str)
def test_any_shape_layout_and_dtype(where, data):
    if where.why_not():
        pytest.skip(where.why_not())
    batch, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    channels = groups * data.draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32]))
    size = (data.draw(st.integers(1, 33)), data.draw(st.integers(1, 33)))
    kernel = data.draw(st.sampled_from([1, 3, 5, 7, 9]))
    options = {"stride": data.draw(st.integers(1, 3)), "dilation": data.draw(st.integers(1, 3))}
    dtype = data.draw(st.sampled_from(DTYPES[: 3 if where.device == "cuda" else 4]))
    problem = Problem(batch, channels, groups, kernel, size, dtype, **options)
    x, weight, grad_out = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](*problem.inputs, problem.grad_out)
    with where.forced():
        problem.check(where, [x, weight], grad_out)
