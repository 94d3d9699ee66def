"""The linear layer's own products: values and gradients, layouts, what falls to `F.linear`, and errors."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import Target, assert_twofold, expanded, sliced, transposed_rows, value_and_grads
from torch import Tensor

from fastib import _native
from fastib.ops.linear import SCHEMAS, linear

module = importlib.import_module("fastib.ops.linear")
pytestmark = pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "")
GPU = None  # it has no GPU implementation
SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 5, 3),
    (3, 5, 16, 32),
    (2, 33, 17, 49),
    (4, 50, 193, 30),
    (1, 200, 390, 24),
    (3, 64, 40, 400),
]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Small products too."""
    monkeypatch.setattr(module, "_FEW", 0)
    monkeypatch.setattr(module, "_SHARE", 0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(B: int = 2, P: int = 9, I: int = 20, O: int = 12) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    return draw(B, P, I), draw(O, I, seed=1), draw(O, seed=2)


def check(tensors: tuple[Tensor, ...], grad: Tensor) -> None:
    actual = value_and_grads(linear, tensors, grad)
    plain = value_and_grads(F.linear, tensors, grad)
    exact = value_and_grads(F.linear, [t.double() for t in tensors], grad.double())
    for name, result in zip(
        ("out", "grad_x", "grad_weight", "grad_bias"), zip(actual, plain, exact, strict=True), strict=False
    ):
        assert_twofold(*result, torch.float32, name=name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(target: Target, poisoned_memory, shape, bias):
    tensors = inputs(*shape)[: 3 if bias else 2]
    check(tensors, draw(*shape[:2], shape[3], seed=3))


@pytest.mark.parametrize(
    "layout", [sliced, transposed_rows, expanded, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)]
)
def test_layouts(target: Target, layout):
    """Of x, of the weight and of the gradient that comes in."""
    x, weight, bias = inputs(3, 40, 33, 50)
    check((layout(x), weight, bias), draw(3, 40, 50, seed=3))
    check((x, weight, bias), layout(draw(3, 40, 50, seed=3)))
    if layout is not expanded:
        check((x, weight.T.contiguous().T, bias), draw(3, 40, 50, seed=3))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_gradients_one_by_one(target: Target, needed):
    tensors = [t.clone().requires_grad_(need) for t, need in zip(inputs(), needed, strict=True)]
    grad = draw(2, 9, 12, seed=3)
    linear(*tensors).backward(grad)
    exact = value_and_grads(F.linear, [t.double() for t in tensors], grad.double())[1:]
    for t, need, expected in zip(tensors, needed, exact, strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)], ids=str)
def test_empty(target: Target, shape):
    check(inputs(*shape), draw(*shape[:2], shape[3], seed=3))


def test_any_number_of_threads_gives_the_same_bits(target: Target, restored_threads):
    tensors, grad = inputs(5, 70, 130, 300), draw(5, 70, 300, seed=3)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(value_and_grads(linear, tensors, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_of_infinities_or_nan_spreads(target: Target):
    """To other rows, although rows of a tile lie side by side."""
    x, weight, bias = inputs(1, 30, 20, 40)
    x[0, 3], x[0, 17] = float("nan"), float("inf")
    out = linear(x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert out.isfinite().all(-1).sum() == 28


@pytest.mark.parametrize("given", ["all", "no bias"])
def test_opcheck(given):
    x, weight, bias = (t.requires_grad_() for t in inputs())
    bias = bias if given == "all" else None
    torch.library.opcheck(torch.ops.fastib.linear.default, (x, weight, bias))
    for needed in ((True, True, True), (False, True, False), (True, False, False)):
        args = draw(2, 9, 12), x.detach(), weight.detach(), *needed
        torch.library.opcheck(torch.ops.fastib.linear_backward.default, args)


def test_compiles_in_one_graph():
    tensors, grad = inputs(), draw(2, 9, 12, seed=3)
    compiled = value_and_grads(torch.compile(linear, fullgraph=True), tensors, grad)
    for actual, expected in zip(compiled, value_and_grads(linear, tensors, grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_programs_that_outlive_the_call_are_pytorch():
    """They may be moved to a device that has no products of ours, or to another dtype."""

    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias):
            return linear(x, weight, bias)

    exported = torch.export.export(Layer(), inputs())
    assert not [node for node in exported.graph.nodes if "fastib" in str(node.target)]
    traced = torch.jit.trace(linear, inputs())
    assert "fastib::" not in str(traced.graph)
    for program in (exported.module(), traced):
        torch.testing.assert_close(program(*inputs()), F.linear(*inputs()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_pytorch(dtype):
    tensors = [t.to(dtype) for t in inputs()]
    assert torch.equal(linear(*tensors), F.linear(*tensors))


def test_autocast_and_transforms_are_pytorch():
    x, weight, bias = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    gradient = torch.func.grad(lambda x: linear(x, weight, bias).square().sum())(x)
    expected = torch.func.grad(lambda x: F.linear(x, weight, bias).square().sum())(x)
    torch.testing.assert_close(gradient, expected)


def test_what_is_too_small_or_too_large_is_pytorch(monkeypatch, restored_threads):
    """Few multiply-adds, a weight that scratch memory would not hold, columns too few for so many threads."""
    torch.set_num_threads(2)
    x, weight, bias = inputs()  # 2 x 9 rows of 20 to 12
    x.requires_grad_()
    for name, right, wrong in (("_FEW", 4320, 4321), ("_LARGEST", 240, 239), ("_SHARE", 10, 11)):
        for value, own in ((right, True), (wrong, False), (right, True)):
            monkeypatch.setattr(module, name, value)
            assert (type(linear(x, weight, bias).grad_fn).__name__ == "_LinearBackward") is own


def test_second_derivative_is_refused():
    x, weight, bias = (t.requires_grad_() for t in inputs())
    (gradient,) = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear: the kernels have no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(9, 20)}, r"x must be of shape \(B, P, I\), got \(9, 20\)"),
    ({"x": [1.0]}, "x must be a tensor, got list"),
    ({"weight": torch.zeros(12, 19)}, r"weight must be of shape \(O, I=20\), got \(12, 19\)"),
    ({"weight": torch.zeros(20)}, r"weight must be of shape \(O, I=20\), got \(20,\)"),
    ({"bias": torch.zeros(11)}, r"bias must be None or of shape \(12,\), got \(11,\)"),
    ({"bias": 0}, "bias must be None or a tensor, got int"),
])  # fmt: skip
def test_value_errors(change, message):
    with pytest.raises(ValueError, match="^linear: " + message):
        linear(**{**dict(zip(("x", "weight", "bias"), inputs(), strict=True)), **change})


def test_device_errors():
    x, weight, bias = inputs()
    with pytest.raises(RuntimeError, match="linear: weight must be on cpu like the other inputs, got meta"):
        linear(x, weight.to("meta"), bias)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.zeros(2, 5), torch.zeros(3, 5), None), "x must have 3 dimensions, but has 2"),
    ((torch.zeros(2, 4, 5), torch.zeros(3), None), "weight must have 2 dimensions, but has 1"),
    ((torch.zeros(2, 4, 5), torch.zeros(3, 6), None), r"weight must have shape \(3, 5\)"),
    ((torch.zeros(2, 4, 5).double(), torch.zeros(3, 5), None), "x must be Float"),
    ((torch.zeros(2, 4, 5), torch.zeros(3, 5), torch.zeros(5)), r"bias must have shape \(3\)"),
])  # fmt: skip
def test_native_operator_checks_for_itself(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.linear(*args)


def test_native_gradients_check_for_themselves():
    x, weight, _ = inputs()
    with pytest.raises(RuntimeError, match=r"grad must have shape \(2, 9, 12\)"):
        torch.ops.fastib.linear_backward(torch.zeros(2, 9, 11), x, weight, True, True, True)
    with pytest.raises(RuntimeError, match="need_bias must be false where need_weight is"):
        torch.ops.fastib.linear_backward(torch.zeros(2, 9, 12), x, weight, True, False, True)
    with pytest.raises(RuntimeError, match="x reaches beyond its storage"):
        x.untyped_storage().resize_(400)
        torch.ops.fastib.linear(x, weight, None)


def test_schemas_agree_with_cpp():
    for name, schema in SCHEMAS.items():
        expected = torch._C.parse_schema(f"fastib::{name}{schema}")
        assert str(getattr(torch.ops.fastib, name).default._schema) == str(expected)
