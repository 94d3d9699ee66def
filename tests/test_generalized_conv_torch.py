"""generalized_conv inside PyTorch: compile, export, autocast, checkpointing, opcheck, and every error message."""

import sys
from collections import Counter

import pytest
import torch
from helpers import Target, max_error, value_and_grads
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastib
from fastib import _native
from fastib.nn import GeneralizedConv2d
from fastib.ops import generalized_conv
from fastib.reference import generalized_conv_ref

GPU = "cuda"
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "-")),
]
COMPILERS = {"reference": "aot_eager", "cpu": "inductor"}  # Inductor's own loops are not what is tested here


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(batch=2, dtype=torch.float32, last=False, **changes):
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (batch, 12, 7, 9), "w_v": (12, 12), "w_o": (12, 12), "bias": (12,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    return tensors | changes


def agree(actual, expected, tolerance=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and max_error(a, b) <= tolerance * max(1.0, b.abs().max().item())


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("last", [False, True])
def test_compile(backend, last):
    """Forward and backward in one graph, with the values and gradients of eager."""

    def function(x, *weights):
        return generalized_conv(x * 1.5, *weights, 6, backend=backend).sin()

    compiled = torch.compile(function, fullgraph=True, backend=COMPILERS[backend])
    tensors = list(inputs(last=last).values())
    agree(value_and_grads(compiled, tensors), value_and_grads(function, tensors))
    with torch.no_grad():
        agree([compiled(*tensors)], [function(*tensors)])


def test_compile_with_changing_sizes():
    compiled = torch.compile(lambda *t: generalized_conv(*t, 4), fullgraph=True, dynamic=True, backend="aot_eager")
    weights = list(inputs().values())[1:]
    for batch, rows, columns in ((2, 7, 9), (5, 8, 6), (3, 5, 5), (2, 12, 3)):
        for last in (False, True):
            x = torch.randn(batch, 12, rows, columns)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            expected = value_and_grads(lambda *t: generalized_conv_ref(*t, 4), [x, *weights])
            agree(value_and_grads(compiled, [x, *weights]), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    class Convolve(nn.Module):
        def forward(self, *tensors):
            return generalized_conv(*tensors, 6, backend=backend) + 1

    sizes = ({0: torch.export.Dim("batch", min=2, max=64)}, None, None, None)
    program = torch.export.export(
        Convolve(), tuple(inputs().values()), dynamic_shapes={"tensors": sizes}, strict=strict
    )
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ("fastib.generalized_conv_shift.default" in names) == (backend == "cpu")
    tensors = inputs(4).values()
    agree([program.module()(*tensors)], [Convolve()(*tensors)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """All inputs are cast; float64 is exempt; gradients come in the dtypes that came in."""
    tensors = [t.requires_grad_() for t in inputs().values()]
    with torch.autocast("cpu", dtype):
        out = generalized_conv(*tensors, 6, backend=backend)
        exempt = generalized_conv(*(t.double() for t in tensors), 6, backend=backend)
    assert out.dtype == dtype and exempt.dtype == torch.float64
    assert torch.equal(out, generalized_conv(*(t.detach().to(dtype) for t in tensors), 6, backend=backend))
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, reentrant):
    def function(*t):
        return generalized_conv(*t, 6, backend=backend)

    expected = value_and_grads(function, list(inputs().values()))
    leaves = [t.requires_grad_() for t in inputs().values()]
    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.backward(torch.ones_like(out))
    agree([out, *(t.grad for t in leaves)], expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_opcheck(device, last, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    for inverse in (False, True):
        x = inputs(dtype=dtype, last=last)["x"].to(device).requires_grad_()
        torch.library.opcheck(torch.ops.fastib.generalized_conv_shift, (x, 6, inverse))


@pytest.mark.parametrize(("last", "batch"), [(True, 2), (True, 30), (False, 30)])  # 30: our own products
def test_no_image_is_copied(last, batch):
    """Two products and a shift forward, their gradients and a shift backward; many pixels are shifted as they are
    stored, in both layouts."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    from torch.profiler import ProfilerActivity, profile

    tensors = [t.requires_grad_() for t in inputs(batch, last=last).values()]
    grad_out = torch.ones(batch, 12, 7, 9).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        out = generalized_conv(*tensors, 6)
        torch.autograd.grad(out, tensors, grad_out)
    events = [(event.key, event.input_shapes) for event in trace.events()]
    copies = [shapes for name, shapes in events if any(w in name for w in ("copy", "clone", "contiguous"))]
    assert not any([batch, 12, 7, 9] in shapes or [batch, 12, 63] in shapes for shapes in copies)
    ours = Counter(name.removeprefix("fastib::generalized_conv") for name, _ in events if name.startswith("fastib::"))
    assert ours == ({"_shift": 2} if batch == 2 else {"": 1, "_backward": 1})


def test_layer():
    torch.manual_seed(0)
    layer = GeneralizedConv2d(18, 9)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "w_v": (18, 18), "w_o": (18, 18), "bias": (18,)
    }  # fmt: skip
    assert not layer.bias.any() and 0 < layer.w_v.abs().max() <= (6 / 36) ** 0.5
    x = torch.randn(2, 18, 5, 6)
    assert torch.equal(layer(x), generalized_conv(x, layer.w_v, layer.w_o, layer.bias, 9))
    assert GeneralizedConv2d(18, 9, bias=False).bias is None and "num_heads=9" in repr(layer)
    for dim, heads in ((18, 4), (18, 0), (0, 1)):
        with pytest.raises(ValueError, match=f"dim must be a multiple of num_heads={heads}, got {dim}"):
            GeneralizedConv2d(dim, heads)


VALUE_ERRORS = [
    ({"x": torch.zeros(12, 7, 9)}, r"x must be of shape \(B, C, rows, columns\), got \(12, 7, 9\)"),
    ({"w_v": torch.zeros(12, 11)}, r"w_v must be of shape \(M, C=12\), got \(12, 11\)"),
    ({"w_v": torch.zeros(12)}, r"w_v must be of shape \(M, C=12\), got \(12,\)"),
    ({"num_heads": 5}, r"w_v must be of M rows, a multiple of num_heads=5, got M=12"),
    ({"num_heads": 0}, r"num_heads must be 1 or more, got 0"),
    ({"num_heads": 1.5}, r"num_heads must be an int, got 1.5"),
    ({"w_o": torch.zeros(12, 11)}, r"w_o must be of shape \(O, M=12\), got \(12, 11\)"),
    ({"bias": torch.zeros(11)}, r"bias must be None or of shape \(12,\), got \(11,\)"),
    ({"x": torch.zeros(2, 12, 7, 9, dtype=torch.int32)}, r"x must be float32.*got torch.int32"),
    ({"w_o": torch.zeros(12, 12).double()}, r"w_o must be torch.float32 like x, got torch.float64"),
    ({"backend": "gpu"}, r"backend must be None or one of .*got 'gpu'"),
]


@pytest.mark.parametrize(("change", "message"), VALUE_ERRORS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
@pytest.mark.parametrize("backend", [None, "reference"])
def test_value_errors(backend, change, message):
    with pytest.raises(ValueError, match="^generalized_conv: " + message):
        generalized_conv(**{**inputs(), "num_heads": 6, "backend": backend, **change})


def test_device_and_backend_errors():
    with pytest.raises(RuntimeError, match="generalized_conv: w_v must be on cpu like the other inputs, got meta"):
        generalized_conv(**inputs(w_v=torch.zeros(12, 12, device="meta")), num_heads=6)
    with pytest.raises(RuntimeError, match="the GPU implementation of generalized_conv is 'cuda'"):
        generalized_conv(**inputs(), num_heads=6, backend="triton")
    reason = "it runs cuda tensors, and the inputs are on cpu" if torch.cuda.is_available() else "no CUDA device"
    with pytest.raises(RuntimeError, match=f"backend='cuda' is not available: {reason}"):
        generalized_conv(**inputs(), num_heads=6, backend="cuda")


def test_backends_are_listed():
    listed = fastib.backends()["generalized_conv"]
    assert set(listed) == {"reference", "cpu", "cuda", "triton"} and listed["reference"] is True
    assert listed["cpu"] is True if _native.lib_available() else listed["cpu"] == _native.why_not()


def test_schemas_agree_with_cpp():
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    for name, schema in sys.modules["fastib.ops.generalized_conv"].SCHEMAS.items():
        expected = torch._C.parse_schema(f"fastib::{name}{schema}")
        assert str(getattr(torch.ops.fastib, name).default._schema) == str(expected)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.zeros(12, 7, 9), 6, False), "x must have shape"),
    ((torch.zeros(2, 12, 7, 9, dtype=torch.int64), 6, False), "x must be float32"),
    ((torch.zeros(2, 12, 7, 9), 5, False), "x must have a multiple of 5 channels"),
    ((torch.zeros(2, 12, 7, 9), 0, True), "num_heads must be 1 or more"),
    ((torch.zeros(2, 12, 7, 9), 2**62, True), "num_heads must be 1 or more"),
])  # fmt: skip
def test_native_operator_checks_for_itself(target: Target, args, message):
    x, *rest = args
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastib.generalized_conv_shift(x.to(target.device), *rest)


def test_a_tensor_whose_storage_was_freed_is_refused(target: Target):
    x = inputs()["x"].to(target.device)
    x.untyped_storage().resize_(4 * 100)
    with pytest.raises(RuntimeError, match="x reaches beyond its storage"):
        torch.ops.fastib.generalized_conv_shift(x, 6, False)
