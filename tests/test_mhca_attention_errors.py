"""mhca_attention: every error message provoked, the choice of a backend, and the schemas."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import Target

import fastib
from fastib import _native
from fastib.ops import mhca_attention
from fastib.ops._arguments import seed_tensor
from fastib.reference import mhca_attention_ref


def inputs(batch=2, heads=3, tokens=10, head_dim=4, dtype=torch.float32):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    qkv = [torch.randn(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(3)]
    return dict(zip("qkv", qkv, strict=True)) | {
        "alpha": torch.ones(heads, dtype=wide),
        "center": torch.zeros(heads, 2, dtype=wide),
    }


@pytest.fixture(params=["reference", "default"])
def backend(request):
    return None if request.param == "default" else "reference"


VALUE_ERRORS = [
    ({"q": torch.zeros(2, 10, 4)}, r"q must be of shape \(B, H, N, D\), got \(2, 10, 4\)"),
    ({"k": torch.zeros(2, 3, 9, 4)}, r"k must be of shape \(2, 3, 10, 4\).*got \(2, 3, 9, 4\)"),
    ({"v": torch.zeros(2, 3, 10, 8)}, r"v must be of shape \(2, 3, 10, 4\).*got \(2, 3, 10, 8\)"),
    ({"alpha": torch.zeros(4)}, r"alpha must be of shape \(3,\).*got \(4,\)"),
    ({"alpha": torch.zeros(())}, r"alpha must be of shape \(3,\).*got \(\)"),
    ({"center": torch.zeros(2, 3)}, r"center must be of shape \(3, 2\).*got \(2, 3\)"),
    ({"q": torch.zeros(2, 3, 10, 4, dtype=torch.int32)}, r"q must be float32.*got torch.int32"),
    ({"q": torch.zeros(2, 3, 10, 4, dtype=torch.complex64)}, r"q must be float32.*got torch.complex64"),
    ({"k": torch.zeros(2, 3, 10, 4, dtype=torch.bfloat16)}, r"k must be torch.float32 like q, got torch.bfloat16"),
    ({"v": torch.zeros(2, 3, 10, 4, dtype=torch.float64)}, r"v must be torch.float32 like q, got torch.float64"),
    ({"alpha": torch.zeros(3, dtype=torch.int64)}, r"alpha must be floating point, got torch.int64"),
    ({"center": torch.zeros(3, 2, dtype=torch.bool)}, r"center must be floating point, got torch.bool"),
    ({"grid_size": 4}, r"q must be of 17 tokens \(num_prefix_tokens=1 \+ grid_size 4 x 4\), got N=10"),
    ({"num_prefix_tokens": 2}, r"q must be of 11 tokens"),
    ({"num_prefix_tokens": -1}, r"num_prefix_tokens must be 0 or more, got -1"),
    ({"grid_size": (-3, -3)}, r"grid_size must be an int or a pair .*got \(-3, -3\)"),
    ({"grid_size": (3, 3, 1)}, r"grid_size must be an int or a pair .*got \(3, 3, 1\)"),
    ({"grid_size": (4.5, 2)}, r"grid_size must be an int or a pair .*got \(4.5, 2\)"),
    ({"grid_size": "3x3"}, r"grid_size must be an int or a pair .*got '3x3'"),
    ({"grid_size": None}, r"grid_size must be an int or a pair .*got None"),
    ({"rpe_dropout": -0.1}, r"rpe_dropout must be a probability in \[0, 1\], got -0.1"),
    ({"rpe_dropout": float("nan")}, r"rpe_dropout must be a probability in \[0, 1\], got nan"),
    ({"attn_dropout": 1.5}, r"attn_dropout must be a probability in \[0, 1\], got 1.5"),
    ({"scale": float("inf")}, r"scale must be a finite number, got inf"),
    ({"grid_size": (3.0, 3.0)}, r"grid_size must be an int or a pair .*got \(3.0, 3.0\)"),
    ({"num_prefix_tokens": 1.0}, r"num_prefix_tokens must be an int, got 1.0"),
    ({"rpe_dropout": "half"}, r"rpe_dropout must be a probability in \[0, 1\], got 'half'"),
    ({"attn_dropout": None}, r"attn_dropout must be a probability in \[0, 1\], got None"),
    ({"scale": "a"}, r"scale must be a finite number, got 'a'"),
    ({"scale": 10**400}, r"scale must be a finite number, got 1000"),
    ({"scale": float("nan")}, r"scale must be a finite number, got nan"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed must be one int64 element, got torch.int64 \(2,\)"),
    ({"seed": torch.zeros(1)}, r"seed must be one int64 element, got torch.float32 \(1,\)"),
    ({"seed": 1.5}, r"seed must be None, an int or a one-element int64 tensor, got 1.5"),
    ({"seed": True}, r"seed must be None, an int or a one-element int64 tensor, got True"),
    ({"seed": 2**63}, r"seed must be a 64-bit signed integer, got 9223372036854775808"),
    ({"backend": "gpu"}, r"backend must be None or one of .*got 'gpu'"),
]


@pytest.mark.parametrize(("change", "message"), VALUE_ERRORS)
def test_value_errors(backend, change, message):
    call = {**inputs(), "grid_size": 3, "backend": backend, **change}
    with pytest.raises(ValueError, match="^mhca_attention: " + message):
        mhca_attention(**call)


def test_numbers_of_numpy(backend):
    call = {**inputs(), "backend": backend, "rpe_dropout": 0.5}
    plain = mhca_attention(**call, grid_size=3, num_prefix_tokens=1, seed=7)
    numbers = {"grid_size": np.int64(3), "num_prefix_tokens": np.int32(1), "seed": np.int64(7)}
    assert torch.equal(plain, mhca_attention(**call, **numbers))


@pytest.mark.parametrize("name", ["k", "v", "alpha", "center", "seed"])
def test_device_errors(backend, name):
    call = {**inputs(), "grid_size": 3, "backend": backend, "rpe_dropout": 0.5}
    call[name] = torch.zeros(1, dtype=torch.int64, device="meta") if name == "seed" else call[name].to("meta")
    with pytest.raises(RuntimeError, match=f"^mhca_attention: {name} must be on cpu like the other inputs, got meta"):
        mhca_attention(**call)


def test_unavailable_backends():
    call = {**inputs(), "grid_size": 3}
    with pytest.raises(
        RuntimeError, match="backend='cuda' is not available: the GPU implementation of mhca_attention is 'triton'"
    ):
        mhca_attention(**call, backend="cuda")
    reason = "it runs cuda tensors, and the inputs are on cpu" if torch.cuda.is_available() else "no CUDA device"
    with pytest.raises(RuntimeError, match=f"backend='triton' is not available: {reason}.*backend='reference'"):
        mhca_attention(**call, backend="triton")
    if not _native.lib_available():
        with pytest.raises(RuntimeError, match=re.escape(_native.why_not())):
            mhca_attention(**call, backend="cpu")


@pytest.mark.gpu
def test_backends_that_do_not_fit_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    call = {name: t.cuda() for name, t in inputs(dtype=torch.float64).items()} | {"grid_size": 3}
    with pytest.raises(RuntimeError, match=r"take float32, bfloat16 or float16, got torch\.float64"):
        mhca_attention(**call, backend="triton")
    with pytest.raises(RuntimeError, match="it runs cpu tensors, and the inputs are on cuda"):
        mhca_attention(**call, backend="cpu")
    assert torch.equal(mhca_attention(**call), mhca_attention_ref(**call))


def test_backends_are_listed():
    listed = fastib.backends()["mhca_attention"]
    assert set(listed) == {"reference", "cpu", "cuda", "triton"} and listed["reference"] is True
    assert listed["cpu"] is True if _native.lib_available() else listed["cpu"] == _native.why_not()
    assert "triton" in listed["cuda"]
    assert all(value is True or (isinstance(value, str) and value) for value in listed.values())


def test_schemas_agree_with_cpp():
    """What Python would define without the library is what the library defines."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    for name, schema in sys.modules["fastib.ops.mhca_attention"].SCHEMAS.items():
        expected = torch._C.parse_schema(f"fastib::{name}{schema}")
        assert str(getattr(torch.ops.fastib, name).default._schema) == str(expected)


def test_native_operator_checks_for_itself(target: Target):
    """The operator under the public function is public too: it raises, whatever it is given."""
    q, k, v, alpha, center = (t.to(target.device) for t in inputs().values())
    good = (q, k, v, alpha, center, None, 3, 3, 1, 0.5, 0.0, 0.0)
    torch.ops.fastib.mhca_attention(*good)
    bad = {0: q[0], 1: k.double(), 2: v[:, :2], 3: alpha.double(), 4: center.T, 6: 4, 8: -1, 10: 2.0, 11: 0.5}
    for position, value in bad.items():
        if target.device == "cpu":
            with pytest.raises(RuntimeError):
                torch.ops.fastib.mhca_attention(*good[:position], value, *good[position + 1 :])


@pytest.mark.parametrize("backend", ["reference", None])
def test_second_derivative(backend):
    call = {name: t.requires_grad_() for name, t in inputs(dtype=torch.float64).items()}
    out = mhca_attention(**call, grid_size=3, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), call["q"], create_graph=True)
    if backend == "reference" or not _native.lib_available():
        assert torch.autograd.grad(grad.sum(), call["alpha"])[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match="no second derivative; pass backend='reference'"):
        grad.sum().backward()


WITHOUT_LIBRARY = """
import sys, warnings
import torch
import fastib._native as native
native.lib_available, native.why_not = (lambda: False), (lambda: "the compiled library is absent (a test)")
warned = []
native.warn_absent = lambda: warned.append(1)
from fastib.ops import backends, mhca_attention
from fastib.reference import mhca_attention_ref
assert backends()["mhca_attention"]["cpu"] == "the compiled library is absent (a test)"
x = [torch.randn(2, 3, 10, 4, requires_grad=True) for _ in range(3)] + [torch.ones(3), torch.zeros(3, 2)]
out = mhca_attention(*x, 3, rpe_dropout=0.1, seed=1)
assert torch.equal(out, mhca_attention_ref(*x, 3, rpe_dropout=0.1, seed=1)) and warned
out.sum().backward()
assert "triton" not in sys.modules
compiled = torch.compile(lambda *x: mhca_attention(*x, 3), fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(*x), mhca_attention_ref(*x, 3), atol=1e-6)
assert str(torch.ops.fastib.mhca_attention.default._schema).startswith("fastib::mhca_attention(Tensor q")
"""


def test_without_the_native_library():
    """The reference takes over, and the operators are still known to the dispatcher."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_LIBRARY], check=True, timeout=240)


def test_seed_of_another_shape_is_taken():
    assert seed_tensor("op", torch.tensor([[5]]), torch.device("cpu")).item() == 5
    assert seed_tensor("op", -1, torch.device("cpu")).item() == -1
