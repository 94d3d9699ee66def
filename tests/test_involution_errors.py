"""involution: every error message provoked, the choice of a backend, and the schemas."""

import re
import sys

import pytest
import torch
from helpers import Target

import fastib
from fastib import _native
from fastib.ops import involution
from fastib.reference import involution_ref

GPU = "cuda"


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return {"x": torch.randn(2, 4, 5, 6, dtype=dtype), "weight": torch.randn(2, 2, 3, 3, 5, 6, dtype=dtype)}


@pytest.fixture(params=["reference", "default"])
def backend(request):
    return None if request.param == "default" else "reference"


VALUE_ERRORS = [
    ({"x": torch.zeros(4, 5, 6)}, r"x must be of shape \(B, C, Hi, Wi\), got \(4, 5, 6\)"),
    ({"weight": torch.zeros(2, 18, 5, 6)}, r"weight must be of shape \(B, G, K, K, Ho, Wo\), got \(2, 18, 5, 6\)"),
    ({"weight": torch.zeros(1, 2, 3, 3, 5, 6)}, r"weight must be of shape \(2, G, K, K, 5, 6\).*got \(1, 2, 3, 3"),
    ({"weight": torch.zeros(2, 2, 3, 5, 5, 6)}, r"weight must be of shape \(2, G, K, K, 5, 6\).*got \(2, 2, 3, 5"),
    ({"weight": torch.zeros(2, 2, 3, 3, 5, 5)}, r"weight must be of shape \(2, G, K, K, 5, 6\).*got .* 5, 5\)"),
    ({"stride": 2}, r"weight must be of shape \(2, G, K, K, 3, 3\), as x is \(2, 4, 5, 6\) and stride=2, got"),
    ({"weight": torch.zeros(2, 2, 2, 2, 5, 6)}, r"weight must be of an odd K, got K=2"),
    ({"weight": torch.zeros(2, 2, 0, 0, 5, 6)}, r"weight must be of an odd K, got K=0"),
    ({"weight": torch.zeros(2, 3, 3, 3, 5, 6)}, r"x must be of C channels, a multiple of weight's G=3 groups, got C=4"),
    ({"weight": torch.zeros(2, 0, 3, 3, 5, 6)}, r"x must be of C channels, a multiple of weight's G=0 groups, got C=4"),
    ({"x": torch.zeros(2, 4, 5, 6, dtype=torch.int32)}, r"x must be float32.*got torch.int32"),
    ({"x": torch.zeros(2, 4, 5, 6, dtype=torch.complex64)}, r"x must be float32.*got torch.complex64"),
    ({"weight": torch.zeros(2, 2, 3, 3, 5, 6, dtype=torch.half)}, r"weight must be torch.float32 like x, got torch.f"),
    ({"stride": 0}, "stride must be 1 or more, got 0"),
    ({"stride": 1.0}, "stride must be an int, got 1.0"),
    ({"stride": (1, 1)}, r"stride must be an int, got \(1, 1\)"),
    ({"stride": True}, "stride must be an int, got True"),
    ({"dilation": 1 << 20}, r"dilation must be below 2\^20, got 1048576"),
    ({"dilation": -1}, "dilation must be 1 or more, got -1"),
    ({"dilation": None}, "dilation must be an int, got None"),
    ({"backend": "gpu"}, r"backend must be None or one of .*got 'gpu'"),
]


@pytest.mark.parametrize(("change", "message"), VALUE_ERRORS)
def test_value_errors(backend, change, message):
    with pytest.raises(ValueError, match="^involution: " + message):
        involution(**{**inputs(), "backend": backend, **change})


def test_device_errors(backend):
    call = inputs()
    call["weight"] = call["weight"].to("meta")
    with pytest.raises(RuntimeError, match=r"^involution: weight must be on cpu like the other inputs, got meta"):
        involution(**call, backend=backend)


def test_unavailable_backends():
    with pytest.raises(RuntimeError, match="'triton' is not available: the GPU implementation of involution is 'cuda'"):
        involution(**inputs(), backend="triton")
    reason = "it runs cuda tensors, and the inputs are on cpu" if torch.cuda.is_available() else "no CUDA device"
    with pytest.raises(RuntimeError, match=f"backend='cuda' is not available: {reason}.*backend='reference'"):
        involution(**inputs(), backend="cuda")
    if not _native.lib_available():
        with pytest.raises(RuntimeError, match=re.escape(_native.why_not())):
            involution(**inputs(), backend="cpu")


@pytest.mark.gpu
def test_backends_that_do_not_fit_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    call = {name: t.cuda() for name, t in inputs(torch.float64).items()}
    with pytest.raises(RuntimeError, match="backend='cpu' is not available: it runs cpu tensors"):
        involution(**call, backend="cpu")
    assert torch.equal(involution(**call), involution_ref(**call))


def test_backends_are_listed():
    listed = fastib.backends()["involution"]
    assert set(listed) == {"reference", "cpu", "cuda", "triton"} and listed["reference"] is True
    assert listed["cpu"] is True if _native.lib_available() else listed["cpu"] == _native.why_not()
    assert "cuda" in listed["triton"]


def test_schemas_agree_with_cpp():
    """What Python would define without the library is what the library defines."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    for name, schema in sys.modules["fastib.ops.involution"].SCHEMAS.items():
        expected = torch._C.parse_schema(f"fastib::{name}{schema}")
        assert str(getattr(torch.ops.fastib, name).default._schema) == str(expected)


BAD = {
    "x of three dimensions": ({0: torch.zeros(4, 5, 6)}, "x must have shape"),
    "x of integers": ({0: torch.zeros(2, 4, 5, 6, dtype=torch.int64)}, "x must be float32"),
    "weight of four dimensions": ({1: torch.zeros(2, 18, 5, 6)}, "weight must have shape"),
    "weight of another batch": ({1: torch.zeros(1, 2, 3, 3, 5, 6)}, "weight must have shape"),
    "weight of another dtype": ({1: torch.zeros(2, 2, 3, 3, 5, 6).double()}, "weight must be Float"),
    "weight of an even K": ({1: torch.zeros(2, 2, 2, 2, 5, 6)}, "odd K"),
    "groups that do not divide": ({1: torch.zeros(2, 3, 3, 3, 5, 6)}, "multiple of the weight's 3 groups"),
    "stride 0": ({2: 0}, "stride must be 1 or more"),
    "stride that does not fit": ({2: 2}, "weight must have shape"),
    "dilation 0": ({3: 0}, "dilation must be 1 or more"),
    "huge dilation": ({3: 2**62}, "dilation must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_native_operators_check_for_themselves(target: Target, case):
    """The operators under the public function are public too: they raise, whatever they are given."""
    changes, message = BAD[case]
    good = [*(t.to(target.device) for t in inputs().values()), 1, 1]
    grad_out = torch.ones(2, 4, 5, 6, device=target.device)
    torch.ops.fastib.involution_backward(grad_out, *good)
    for position, value in changes.items():
        good[position] = value.to(target.device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.involution(*good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.involution_backward(grad_out, *good)


def test_native_backward_checks_its_gradient(target: Target):
    good = [*(t.to(target.device) for t in inputs().values()), 1, 1]
    for wrong in (torch.ones(2, 4, 5, 5), torch.ones(2, 4, 5, 6).double(), torch.ones(2, 4, 5)):
        with pytest.raises(RuntimeError, match="grad_out must"):
            torch.ops.fastib.involution_backward(wrong.to(target.device), *good)


def test_a_tensor_whose_storage_was_freed_is_refused(target: Target):
    x, weight = (t.to(target.device) for t in inputs().values())
    weight.untyped_storage().resize_(4 * 100)
    with pytest.raises(RuntimeError, match="weight reaches beyond its storage"):
        torch.ops.fastib.involution(x, weight, 1, 1)


def test_second_derivative(backend):
    call = {name: t.requires_grad_() for name, t in inputs(torch.float64).items()}
    out = involution(**call, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), call["x"], create_graph=True)
    if backend == "reference" or not _native.lib_available():
        assert torch.autograd.grad(grad.sum(), call["weight"])[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match="no second derivative; pass backend='reference'"):
        grad.sum().backward()
