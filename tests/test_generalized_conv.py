"""generalized_conv: the shift bit by bit, and the whole against float64, on every instruction set and on the GPU."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_twofold,
    expanded,
    kernel_targets,
    max_error,
    on_device,
    sliced,
    transposed_rows,
    value_and_grads,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastib.ops import generalized_conv
from fastib.reference import generalized_conv_ref
from fastib.reference.generalized_conv import generalized_conv_shift_ref, materialized_kernel, taps

GPU = "cuda"
sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are no installed package
from benchmarks.memory import peak_extra_bytes  # noqa: E402

NAMES = ("out", "grad_x", "grad_w_v", "grad_w_o", "grad_bias")


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "sliced": sliced,
    "sliced_channels_last": lambda t: sliced(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "rows_not_dense": transposed_rows,
    "expanded": expanded,
    "one_number": lambda t: t[:1, :1, :1, :1].expand(t.shape),
}


def draw(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(heads, dim, size, dtype, batch=2):
    """x, w_v, w_o, bias and the gradient of the result; weights as a layer has them."""
    weights = [draw((dim, dim), dtype, seed) * dim**-0.5 for seed in (1, 2)]
    return [draw((batch, dim, *size), dtype), *weights, draw((dim,), dtype, 3)], draw((batch, dim, *size), dtype, 4)


def shift(target, x, heads, inverse=False):
    return torch.ops.fastib.generalized_conv_shift(on_device(x, target.device), heads, inverse)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b)


def check(target, inputs, grad_out, heads):
    """Value and gradients by the two-fold rule; the floor is what 16 or 32 bits lose on the values between products."""
    place = [on_device(t, target.device) for t in inputs]
    actual = value_and_grads(
        lambda *t: generalized_conv(*t, heads, backend=target.backend), place, on_device(grad_out, target.device)
    )
    same = value_and_grads(lambda *t: generalized_conv_ref(*t, heads), inputs, grad_out)
    wide = [t.double() for t in inputs]
    exact = value_and_grads(lambda *t: generalized_conv_ref(*t, heads), wide, grad_out.double())
    dtype = inputs[0].dtype
    for name, *values in zip(NAMES, actual, same, exact, strict=True):
        sums = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * values[2].abs().max().item()
        assert_twofold(*values, dtype, sums, name)
    return actual


def test_the_taps():
    """Row by row, the first of the window; an even window reaches below and to the right of its centre."""
    assert taps(1) == [(0, 0)]
    assert taps(2) == [(0, 0), (0, 1)]
    assert taps(4) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert taps(6) == [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1)]
    assert taps(9) == [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    assert taps(16) == [(row, column) for row in (-1, 0, 1, 2) for column in (-1, 0, 1, 2)]
    assert taps(26)[0] == (-2, -2) and taps(26)[25] == (2, -1) and len(taps(26)) == 26


def test_the_reference_is_its_formula():
    """By hand, pixel by pixel, tap by tap, with Eq. 3's per-head weight W_O W_V."""
    for heads in (1, 2, 4, 6, 9):
        (x, w_v, w_o, bias), _ = problem(heads, 2 * heads, (4, 5), torch.float64)
        expected = bias[:, None, None].expand(2, -1, 4, 5).clone()
        for head, (down, right) in enumerate(taps(heads)):
            part = slice(2 * head, 2 * head + 2)
            weight = w_o[:, part] @ w_v[part]
            for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
                if 0 <= i + down < 4 and 0 <= j + right < 5:
                    expected[:, :, i, j] += x[:, :, i + down, j + right] @ weight.T
        torch.testing.assert_close(generalized_conv_ref(x, w_v, w_o, bias, heads), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [1, 4, 6, 9, 12, 16, 25])
def test_equals_a_convolution(target, heads, layout):
    """With the dense kernel of the window, gradients included; nine heads are a 3 x 3 convolution with padding 1."""
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    inputs, grad_out = problem(heads, 2 * heads, (6, 7), torch.float64)

    def convolution(x, w_v, w_o, bias):
        kernel = materialized_kernel(w_v, w_o, heads)
        before = (kernel.shape[2] - 1) // 2
        after = kernel.shape[2] - 1 - before
        return F.conv2d(F.pad(x, (before, after, before, after)), kernel, bias)

    assert heads != 9 or materialized_kernel(*inputs[1:3], 9).shape[2:] == (3, 3)
    expected = value_and_grads(convolution, inputs, grad_out)
    inputs[0], grad_out = LAYOUTS[layout](inputs[0]), LAYOUTS[layout](grad_out)
    actual = value_and_grads(lambda *t: generalized_conv(*t, heads, backend=target.backend), inputs, grad_out)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift(target, layout, dtype):
    """Bit by bit, for every number of heads from 1 to 32, both ways, in any layout."""
    for heads in range(1, 33):
        dim = heads * (1, 8, 3)[heads % 3]
        x = LAYOUTS[layout](draw((2, dim, *((5, 6), (7, 4), (1, 9))[heads % 3]), dtype, heads))
        for inverse in (False, True):
            assert same_bits(shift(target, x, heads, inverse), generalized_conv_shift_ref(x, heads, inverse)), heads


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3), (14, 14), (28, 28), (7, 7), (33, 65), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shift_sizes(target, size, dtype):
    """Images smaller than the window, rows of any length, heads of 1 to 64 channels."""
    for heads, width in ((9, 32), (6, 64), (25, 5), (4, 17), (32, 1), (1, 48)):
        x = draw((2, heads * width, *size), dtype)
        for order in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
            for inverse in (False, True):
                actual = shift(target, order(x), heads, inverse)
                assert same_bits(actual, generalized_conv_shift_ref(x, heads, inverse))
                assert actual.is_contiguous(
                    memory_format=torch.channels_last if order(x).stride(1) == 1 else torch.contiguous_format
                ) or 1 in (*size, heads * width)


def test_the_inverse_is_the_gradient(target):
    """<shift(x), y> = <x, inverse shift(y)>, whatever x and y hold."""
    x, y = draw((2, 12, 5, 6), torch.float32), draw((2, 12, 5, 6), torch.float32, 1)
    for heads in (1, 2, 3, 4, 6, 12):
        there, back = shift(target, x, heads).cpu().double(), shift(target, y, heads, True).cpu().double()
        torch.testing.assert_close((there * y.double()).sum(), (x.double() * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(target, layout, dtype):
    """The result has x's memory format."""
    for heads, dim, size in ((9, 72, (14, 14)), (6, 48, (7, 5)), (4, 16, (9, 8))):
        inputs, grad_out = problem(heads, dim, size, dtype)
        inputs[0], grad_out = LAYOUTS[layout](inputs[0]), LAYOUTS[layout](grad_out)
        out = check(target, inputs, grad_out, heads)[0]
        last = inputs[0].stride(1) == 1
        assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_other_widths_and_no_bias(target):
    """More or fewer values than channels, and another number of results."""
    for order in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        x, w_v, w_o = (
            order(draw((2, 10, 5, 6), torch.float32)),
            draw((12, 10), torch.float32),
            draw((7, 12), torch.float32),
        )
        inputs, grad_out = [x, w_v, w_o], order(draw((2, 7, 5, 6), torch.float32, 1))
        actual = value_and_grads(
            lambda *t: generalized_conv(*t, None, 6, backend=target.backend),
            [t.to(target.device) for t in inputs], grad_out.to(target.device),
        )  # fmt: skip
        exact = value_and_grads(
            lambda *t: generalized_conv_ref(*t, None, 6), [t.double() for t in inputs], grad_out.double()
        )
        for a, b in zip(actual, exact, strict=True):
            assert max_error(a, b) <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("shape", [(0, 6, 5, 6), (2, 0, 5, 6), (2, 6, 0, 6), (2, 6, 5, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_of_zero(target, shape, layout):
    x, weight, bias = LAYOUTS[layout](torch.ones(shape)), torch.ones(shape[1], shape[1]), torch.ones(shape[1])
    actual, expected = (
        value_and_grads(f, [t.to(target.device) for t in (x, weight, weight, bias)])
        for f in (lambda *t: generalized_conv(*t, 3, backend=target.backend), lambda *t: generalized_conv_ref(*t, 3))
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uninitialised_memory_is_never_read(target, poisoned_memory, layout):
    for heads, width in ((9, 8), (6, 3), (4, 16)):
        x = LAYOUTS[layout](draw((2, heads * width, 9, 7), torch.float32))
        assert same_bits(shift(target, x, heads), generalized_conv_shift_ref(x, heads))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_move_like_other_values(target, layout):
    x = draw((1, 27, 6, 7), torch.float32)
    x[0, 4, 2, 3], x[0, 20, 0, 0] = torch.nan, torch.inf
    actual, expected = shift(target, LAYOUTS[layout](x), 9).cpu(), generalized_conv_shift_ref(x, 9)
    assert torch.equal(actual.nan_to_num(1e30, 2e30), expected.nan_to_num(1e30, 2e30)) and actual.isnan().sum() == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_twice_and_with_any_thread_count(target, restored_threads, layout):
    inputs, grad_out = problem(9, 72, (14, 14), torch.float32, batch=5)
    x, results = LAYOUTS[layout](inputs[0]), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append((shift(target, x, 9), shift(target, LAYOUTS[layout](grad_out), 9, True)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(target, layout):
    """Once and twice."""
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    inputs, _ = problem(4, 8, (3, 4), torch.float64, batch=1)
    inputs = [LAYOUTS[layout](inputs[0]), *inputs[1:]]
    leaves = [t.requires_grad_() for t in inputs]
    for check_gradients in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradients(lambda *t: generalized_conv(*t, 4, backend=target.backend), leaves)


def test_only_some_gradients(target):
    inputs, grad_out = problem(6, 12, (5, 6), torch.float32)
    place = [t.to(target.device) for t in inputs]
    _, *grads = value_and_grads(
        lambda *t: generalized_conv(*t, 6, backend=target.backend), place, grad_out.to(target.device)
    )
    for index, expected in enumerate(grads):
        leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate(place)]
        generalized_conv(*leaves, 6, backend=target.backend).backward(grad_out.to(target.device))
        assert torch.equal(leaves[index].grad, expected)


def test_memory(target):
    """What is kept for the gradient: the moved values. No dense kernel, no matrix of places, no copy of x."""
    if target.device == "cuda":
        pytest.skip("the profiler counts the host's memory")
    inputs, grad_out = problem(9, 72, (28, 28), torch.float32, batch=4)
    inputs[0], grad_out = channels_last(inputs[0]), channels_last(grad_out)
    leaves = [t.requires_grad_() for t in inputs]

    def step():
        out = generalized_conv(*leaves, 9, backend=target.backend)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    image = grad_out.numel() * grad_out.element_size()
    assert peak_extra_bytes(step, "cpu") <= 4.2 * image  # moved values, result, and the gradient on its way back


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("where", kernel_targets(GPU), ids=str)
def test_any_shape_layout_and_dtype(where, data):
    if where.why_not():
        pytest.skip(where.why_not())
    heads, width = data.draw(st.integers(1, 32)), data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16]))
    size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 33))
    dtype = data.draw(st.sampled_from(DTYPES[: 3 if where.device == "cuda" else 4]))
    x = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](draw((2, heads * width, *size), dtype))
    inverse = data.draw(st.booleans())
    with where.forced():
        assert same_bits(shift(where, x, heads, inverse), generalized_conv_shift_ref(x, heads, inverse))
