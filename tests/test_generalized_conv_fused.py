"""generalized_conv's own float32 products on the CPU: against float64, on every instruction set."""

import itertools
import sys

import pytest
import torch
from helpers import kernel_targets, max_error, value_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastib import _native
from fastib.ops import generalized_conv
from fastib.reference import generalized_conv_ref

CPUS = kernel_targets()
MODULE = sys.modules["fastib.ops.generalized_conv"]
FORMATS = torch.contiguous_format, torch.channels_last
pytestmark = pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "-")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(MODULE, "_FEW", -1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(batch, channels, heads, width, results, size, last=False, bias=True):
    """x, w_v, w_o and the bias, and the gradient of the result."""
    values = heads * width
    x, grad_out = draw(batch, channels, *size), draw(batch, results, *size, seed=1)
    if last:
        x, grad_out = (t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (x, grad_out))
    weights = [
        draw(values, channels, seed=2) * channels**-0.5,
        draw(results, values, seed=3) * values**-0.5,
    ]
    return [x, *weights, *([draw(results, seed=4)] if bias else [])], grad_out


def run(function, heads, inputs, grad_out):
    return value_and_grads(
        lambda x, w_v, w_o, bias=None: function(x, w_v, w_o, bias, heads), inputs, grad_out.to(inputs[0].dtype)
    )


def check(heads, inputs, grad_out):
    """Each entry is off by a few roundings of the sum of its terms' magnitudes, which the same sums of |.| give."""
    actual = run(generalized_conv, heads, inputs, grad_out)
    exact = run(generalized_conv_ref, heads, [t.double() for t in inputs], grad_out)
    terms = run(generalized_conv_ref, heads, [t.double().abs() for t in inputs], grad_out.abs())
    assert MODULE._fused(inputs[0])
    for a, b, size in zip(actual, exact, terms, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert ((a - b).abs() <= 2e-6 * size + 1e-30).all()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("where", CPUS, ids=str)
def test_any_shape_and_layout(where, data):
    """Heads that end inside a vector, images smaller than the window, rows and blocks that fill no tile."""
    if where.why_not():
        pytest.skip(where.why_not())
    heads, width = data.draw(st.integers(1, 32)), data.draw(st.sampled_from([1, 2, 3, 7, 8, 16, 24]))
    channels, results = data.draw(st.sampled_from([1, 3, 8, 16, 33])), data.draw(st.sampled_from([1, 5, 16, 40]))
    size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 33))
    case = problem(data.draw(st.sampled_from([1, 2, 9])), channels, heads, width, results, size, *data.draw(
        st.tuples(st.booleans(), st.booleans())
    ))  # fmt: skip
    with where.forced():
        check(heads, *case)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [5, 17])
@pytest.mark.parametrize("where", CPUS, ids=str)
def test_many_pixels(where, batch, last):
    """Several blocks an image and several parts of the weights' gradients, planes a power of two apart among them."""
    if where.why_not():
        pytest.skip(where.why_not())
    with where.forced():
        check(9, *problem(batch, 24, 9, 8, 31, (23, 29), last))
        check(9, *problem(batch, 24, 9, 8, 31, (32, 32), last))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [5, 17])
def test_same_bits_with_any_thread_count(restored_threads, batch, last):
    inputs, grad_out = problem(batch, 24, 9, 8, 40, (23, 29), last)
    results = []
    for threads in (1, 2, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(generalized_conv, 9, inputs, grad_out))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("where", CPUS, ids=str)
def test_image_by_image(where, data):
    """Images of a large batch have the bits that they have alone."""
    if where.why_not():
        pytest.skip(where.why_not())
    heads, width = data.draw(st.integers(1, 16)), data.draw(st.sampled_from([1, 3, 8, 16]))
    size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 33))
    last, with_bias = data.draw(st.tuples(st.booleans(), st.booleans()))
    inputs, grad_out = problem(8, 5, heads, width, 7, size, last, with_bias)
    x, *weights = inputs
    with where.forced():
        out, grad_x, *_ = run(generalized_conv, heads, inputs, grad_out)
        assert torch.equal(generalized_conv(x, *weights, *([] if with_bias else [None]), heads), out)
        for image in (0, 7):
            here = slice(image, image + 1)
            alone = run(generalized_conv, heads, [x[here], *weights], grad_out[here])
            assert torch.equal(alone[0], out[here]) and torch.equal(alone[1], grad_x[here])


@pytest.mark.parametrize("last", [False, True])
def test_inference(restored_threads, last):
    inputs, _ = problem(4, 6, 9, 2, 7, (5, 6), last)
    expected = generalized_conv(*(t.clone().requires_grad_() for t in inputs), 9).detach()
    for threads in (1, 2, 3):  # from 3 on there are too few images
        torch.set_num_threads(threads)
        assert torch.equal(generalized_conv(*inputs, 9), expected)


@pytest.mark.parametrize("last", [False, True])
def test_the_result_has_the_layout_of_x(last):
    inputs, _ = problem(2, 6, 9, 2, 7, (5, 6), last)
    out = generalized_conv(*inputs, 9)
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_in_other_layouts(last):
    """An expanded gradient, and one of the other layout."""
    inputs, grad_out = problem(2, 6, 9, 2, 7, (5, 6), last)
    check(9, inputs, grad_out[:, :, :1, :1].expand(grad_out.shape))
    check(9, inputs, grad_out.contiguous() if last else grad_out.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("last", [False, True])
def test_weights_in_any_layout(last):
    """As the rows of a packed weight are, and transposed."""
    (x, w_v, w_o, bias), grad_out = problem(2, 6, 9, 2, 18, (5, 6), last)
    packed = torch.cat([w_v, w_v, w_v])[18:36]
    check(9, [x, packed, w_o.T.contiguous().T, bias], grad_out)
    check(9, [x, torch.cat([w_v, w_v], 1)[:, :6], w_o, bias], grad_out)


@pytest.mark.parametrize("last", [False, True])
def test_only_some_gradients(last):
    inputs, grad_out = problem(2, 6, 9, 2, 7, (5, 6), last)
    _, *grads = run(generalized_conv, 9, inputs, grad_out)
    for index, expected in enumerate(grads):
        leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        generalized_conv(*leaves, 9).backward(grad_out)
        assert torch.equal(leaves[index].grad, expected)


@pytest.mark.parametrize("batch", [2, 9])
def test_values_are_kept_only_where_a_gradient_needs_them(batch):
    inputs, grad_out = problem(batch, 6, 9, 2, 7, (5, 6))
    _, *grads = run(generalized_conv, 9, inputs, grad_out)
    for needed in itertools.product((False, True), repeat=4):
        if not any(needed):
            continue
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = generalized_conv(*leaves, 9)
        values = sum(t.numel() for t in kept) - sum(t.numel() for t in inputs)
        assert values == (batch * 5 * 6 * 9 * 2 + 16 if any(needed[2:]) else 0)
        out.backward(grad_out)
        for leaf, need, expected in zip(leaves, needed, grads, strict=True):
            assert torch.equal(leaf.grad, expected) if need else leaf.grad is None


@pytest.mark.parametrize("last", [False, True])
def test_second_derivatives(last):
    inputs, grad_out = problem(2, 6, 4, 3, 7, (5, 6), last)

    def second(function, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves, 4).sin(), leaves, grad_out.to(leaves[0].dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    exact = second(generalized_conv_ref, *(t.double() for t in inputs))
    for a, b in zip(second(generalized_conv, *inputs), exact, strict=True):
        assert max_error(a, b) <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("last", [False, True])
def test_second_derivatives_of_inputs_that_depend_on_each_other(last):
    """One tensor as both weights, one made of the other, and weights that x was made with."""
    (x, weight, _), _ = problem(2, 6, 3, 2, 6, (5, 6), last, bias=False)

    def first_and_second(function, x, weight):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        x, weight = leaves
        hidden = function(x, weight, weight, None, 3)
        out = function(hidden, weight, (2 * weight).sin(), None, 3)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    exact = first_and_second(generalized_conv_ref, x.double(), weight.double())
    for a, b in zip(first_and_second(generalized_conv, x, weight), exact, strict=True):
        assert max_error(a, b) <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("last", [False, True])
def test_nan_stays_where_it_is(last):
    """A pixel that is not a number reaches the results that it is summed into, and no others."""
    (x, *weights), _ = problem(1, 6, 9, 2, 7, (5, 6), last)
    x[0, 3, 2, 2] = torch.nan
    bad = generalized_conv(x, *weights, 9).isnan()
    expected = torch.zeros(1, 7, 5, 6, dtype=torch.bool)
    expected[:, :, 1:4, 1:4] = True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("last", [False, True])
def test_uninitialised_memory_is_never_read(poisoned_memory, last):
    for heads, width, size in ((9, 8, (9, 7)), (6, 3, (1, 2)), (25, 2, (2, 2))):
        check(heads, *problem(2, 5, heads, width, 7, size, last))


@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last):
    (x, w_v, w_o, bias), grad_out = problem(1, 6, 9, 2, 7, (5, 6), last)
    x, grad_out = x.expand(8, -1, -1, -1), grad_out.expand(8, -1, -1, -1)
    tests = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.fastib.generalized_conv, torch.ops.fastib.generalized_conv_backward
    for batch in (2, 8):
        inputs = x[:batch].contiguous(memory_format=FORMATS[last]), w_v, w_o
        for keep in (False, True):
            torch.library.opcheck(forward, (*inputs, bias if keep else None, 9, keep), test_utils=tests)
        values = forward(*inputs, None, 9, True)[1]
        for needed in itertools.product((False, True), repeat=4):
            torch.library.opcheck(backward, (grad_out[:batch], *inputs, values, 9, *needed), test_utils=tests)


X, W_V, W_O = torch.zeros(2, 6, 5, 4), torch.zeros(9, 6), torch.zeros(7, 9)
VALUES = torch.zeros(2 * 20 * 9 + 16)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.zeros(6, 5, 4), W_V, W_O, None, 1), "x must have shape"),
    ((X.double(), W_V, W_O, None, 1), "x must be Float"),
    ((X, torch.zeros(9), W_O, None, 1), "w_v must have two dimensions"),
    ((X, W_V, torch.zeros(9), None, 1), "w_o must have two dimensions"),
    ((X, torch.zeros(9, 5), W_O, None, 1), "w_v must have shape"),
    ((X, W_V, torch.zeros(7, 8), None, 1), "w_o must have shape"),
    ((X, W_V.double(), W_O, None, 1), "w_v must be Float"),
    ((X, W_V, W_O.double(), None, 1), "w_o must be Float"),
    ((X, W_V, W_O, None, 2), "num_heads must be 1 or more and divide the 9 rows of w_v"),
    ((X, W_V, W_O, None, 0), "num_heads must be 1 or more"),
    ((X, W_V, W_O, None, 2**62), "num_heads must be 1 or more"),
    ((X, W_V, W_O, torch.zeros(8), 3), "bias must have shape"),
    ((X, W_V, W_O, torch.zeros(7).double(), 3), "bias must be Float"),
])  # fmt: skip
def test_the_kernel_checks_for_itself(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.generalized_conv(*args, True)


@pytest.mark.parametrize(("grad", "x", "values", "message"), [
    (torch.zeros(7, 5, 4), X, VALUES, "grad must have shape"),
    (torch.zeros(2, 7, 5, 3), X, VALUES, "grad must have shape"),
    (torch.zeros(3, 7, 5, 4), X, VALUES, "grad must have shape"),
    (torch.zeros(2, 7, 5, 4).double(), X, VALUES, "grad must be Float"),
    (torch.zeros(2, 7, 5, 4), X[0], VALUES, "x must have shape"),
    (torch.zeros(2, 7, 5, 4), X, VALUES[1:], "values must have shape"),
    (torch.zeros(2, 7, 5, 4), X, VALUES.double(), "values must be Float"),
])  # fmt: skip
def test_the_gradient_checks_for_itself(grad, x, values, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.generalized_conv_backward(grad, x, W_V, W_O, values, 9, True, True, True, True)


@pytest.mark.parametrize("shape", [(0, 6, 5, 6), (9, 0, 5, 6), (9, 6, 0, 6), (2, 6, 5, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("widths", [(9, 7), (0, 7), (9, 0), (0, 0)])
def test_sizes_of_zero(shape, widths):
    x, w_v, w_o = torch.ones(shape), torch.ones(widths[0], shape[1]), torch.ones(widths[1], widths[0])
    bias, grad = torch.ones(widths[1]), torch.ones(shape[0], widths[1], *shape[2:])
    out, values = torch.ops.fastib.generalized_conv(x, w_v, w_o, bias, 9, True)
    actual = torch.ops.fastib.generalized_conv_backward(grad, x, w_v, w_o, values, 9, True, True, True, True)
    expected = value_and_grads(lambda *t: generalized_conv_ref(*t, 9), [x, w_v, w_o, bias], grad)
    for a, b in zip((out, *actual), expected, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
