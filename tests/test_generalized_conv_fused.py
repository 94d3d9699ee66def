"""generalized_conv's own float32 products on the CPU: against float64, on every instruction set."""

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
    case = problem(data.draw(st.integers(1, 3)), channels, heads, width, results, size, *data.draw(
        st.tuples(st.booleans(), st.booleans())
    ))  # fmt: skip
    with where.forced():
        check(heads, *case)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("where", CPUS, ids=str)
def test_many_pixels(where, last):
    """Several blocks an image and several parts of the weight's gradient."""
    if where.why_not():
        pytest.skip(where.why_not())
    with where.forced():
        check(9, *problem(5, 24, 9, 8, 31, (23, 29), last))


@pytest.mark.parametrize("last", [False, True])
def test_same_bits_with_any_thread_count(restored_threads, last):
    inputs, grad_out = problem(5, 24, 9, 8, 40, (23, 29), last)
    results = []
    for threads in (1, 2, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(generalized_conv, 9, inputs, grad_out))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("where", CPUS, ids=str)
def test_image_by_image(where, data):
    """The same bits as one product after the other."""
    if where.why_not():
        pytest.skip(where.why_not())
    heads, width = data.draw(st.integers(1, 16)), data.draw(st.sampled_from([1, 3, 8, 16]))
    size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 33))
    last, with_bias = data.draw(st.tuples(st.booleans(), st.booleans()))
    (x, w_v, w_o, *rest), _ = problem(3, 5, heads, width, 7, size, last, with_bias)
    bias = rest[0] if with_bias else None
    product, both = torch.ops.fastib.generalized_conv_product, torch.ops.fastib.generalized_conv_both
    with where.forced():
        values = product(x, w_v, None, heads, False, False)
        expected = product(values, w_o, bias, 1, False, False)
        kept, dropped = both(x, w_v, w_o, bias, heads, True), both(x, w_v, w_o, bias, heads, False)
    assert torch.equal(kept[0], expected) and torch.equal(kept[1], values) and torch.equal(dropped[0], expected)


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
    (x, w_v, *_), grad_out = problem(2, 6, 9, 2, 7, (5, 6), last)
    product, grad_weight = torch.ops.fastib.generalized_conv_product, torch.ops.fastib.generalized_conv_grad_weight
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(product, (x, w_v, None, 9, False, False), test_utils=tests)
    torch.library.opcheck(product, (x, w_v.T.contiguous(), None, 9, True, True), test_utils=tests)
    for with_bias in (False, True):
        both = torch.ops.fastib.generalized_conv_both
        torch.library.opcheck(both, (x, w_v, w_v.T, None, 9, with_bias), test_utils=tests)
        torch.library.opcheck(grad_weight, (grad_out, x, with_bias), test_utils=tests)


X, W = torch.zeros(2, 6, 5, 4), torch.zeros(9, 6)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.zeros(6, 5, 4), W, None, 1, False, False), "x must have shape"),
    ((X.double(), W, None, 1, False, False), "x must be Float"),
    ((X, torch.zeros(9), None, 1, False, False), "weight must have two dimensions"),
    ((X, W.T, None, 1, False, False), "weight must have shape"),
    ((X, W, None, 1, False, True), "weight must have shape"),
    ((X, W.double(), None, 1, False, False), "weight must be Float"),
    ((X, W, None, 2, False, False), "num_heads must be 1 or more and divide 9 channels"),
    ((X, W, None, 0, False, False), "num_heads must be 1 or more"),
    ((X, W, None, 2**62, False, False), "num_heads must be 1 or more"),
    ((X, W, torch.zeros(9), 3, False, False), "bias must be None where num_heads is not 1"),
    ((X, W, torch.zeros(8), 1, False, False), "bias must have shape"),
])  # fmt: skip
def test_the_product_checks_for_itself(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.generalized_conv_product(*args)


@pytest.mark.parametrize(("grad", "x", "message"), [
    (torch.zeros(6, 5, 4), X, "grad must have shape"),
    (torch.zeros(2, 7, 5, 3), X, "grad must have the pixels of x"),
    (torch.zeros(3, 7, 5, 4), X, "grad must have the pixels of x"),
    (torch.zeros(2, 7, 5, 4).double(), X, "grad must be Float"),
    (torch.zeros(2, 7, 5, 4), X[0], "x must have shape"),
])  # fmt: skip
def test_the_gradient_checks_for_itself(grad, x, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.generalized_conv_grad_weight(grad, x, True)
