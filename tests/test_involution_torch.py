"""involution inside PyTorch: compile, export, autocast, checkpointing, opcheck, by value."""

import pytest
import torch
from helpers import max_error, value_and_grads
from involution_problem import LAYOUTS, channels_last
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastib import _native
from fastib.nn import Involution2d
from fastib.ops import involution
from fastib.reference import involution_ref

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "-")),
]
COMPILERS = {"reference": "aot_eager", "cpu": "inductor"}  # Inductor's own loops are not what is tested here
OPTIONS = {"stride": 2, "dilation": 2}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(batch, 6, 7, 9, generator=generator), torch.randn(batch, 2, 3, 3, 4, 5, generator=generator)
    return [x.to(dtype), weight.to(dtype)]


def agree(actual, expected, tolerance=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and max_error(a, b) <= tolerance * max(1.0, b.abs().max().item())


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(backend, layout):
    """Forward and backward in one graph, with the values and gradients of eager."""

    def function(*x):
        return involution(*(t * 1.5 for t in x), backend=backend, **OPTIONS).flatten(2).sin()

    compiled = torch.compile(function, fullgraph=True, backend=COMPILERS[backend])
    grad_out = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
    x, weight, _ = LAYOUTS[layout](*inputs(), inputs()[0])
    agree(value_and_grads(compiled, [x, weight], grad_out), value_and_grads(function, [x, weight], grad_out))
    with torch.no_grad():
        agree([compiled(x, weight)], [function(x, weight)])


def test_compile_with_changing_sizes():
    compiled = torch.compile(lambda *t: involution(*t, stride=2), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, rows, columns in ((2, 7, 9), (5, 8, 6), (3, 5, 5), (2, 12, 3)):
        x, weight = (
            torch.randn(batch, 6, rows, columns),
            torch.randn(batch, 2, 3, 3, (rows + 1) // 2, (columns + 1) // 2),
        )
        agree(
            value_and_grads(compiled, [x, weight]),
            value_and_grads(lambda *t: involution_ref(*t, stride=2), [x, weight]),
        )


def test_compiled_module_under_autocast(backend):
    torch.manual_seed(0)
    module = Involution2d(32, 3, stride=2, backend=backend)
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.randn(2, 32, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = module(x), compiled(x)
    assert actual.dtype == torch.bfloat16 and max_error(actual, expected) < 2e-2
    actual.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


class Involve(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, weight):
        return involution(x, weight, backend=self.backend, **OPTIONS) + 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Involve(backend), tuple(inputs()), dynamic_shapes=({0: batch}, {0: batch}), strict=strict
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ("fastib.involution.default" in targets) == (backend == "cpu")
    agree([program.module()(*inputs(4))], [Involve(backend)(*inputs(4))])
    agree([program.run_decompositions().module()(*inputs(4))], [Involve(backend)(*inputs(4))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """x and weight are cast, whatever they were; float64 is exempt; gradients come in the dtypes that came in."""
    x, weight = (t.requires_grad_() for t in inputs())
    with torch.autocast("cpu", dtype):
        out = involution(x, weight.to(dtype), backend=backend, **OPTIONS)
        exempt = involution(x.double(), weight.double(), backend=backend, **OPTIONS)
    assert out.dtype == dtype and exempt.dtype == torch.float64
    expected = involution(x.detach().to(dtype), weight.detach().to(dtype), backend=backend, **OPTIONS)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, reentrant):
    def function(*t):
        return involution(*t, backend=backend, **OPTIONS)

    expected = value_and_grads(function, inputs())
    leaves = [t.detach().clone().requires_grad_() for t in inputs()]
    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.backward(torch.ones_like(out))
    agree([out, *(t.grad for t in leaves)], expected, 0.0)


def device_or_skip(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    return device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_opcheck(device, layout, dtype):
    device_or_skip(device)
    x, weight, grad_out = LAYOUTS[layout](*inputs(dtype=dtype), torch.ones(2, 6, 4, 5, dtype=dtype))
    x, weight, grad_out = (t.to(device) for t in (x, weight, grad_out))
    args = (x.requires_grad_(), weight.requires_grad_(), 2, 1)
    torch.library.opcheck(torch.ops.fastib.involution, args, rtol=1e-2, atol=1e-2)
    torch.library.opcheck(
        torch.ops.fastib.involution_backward, (grad_out, x.detach(), weight.detach(), 2, 1), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_layouts(device, layout):
    """The fakes promise the strides that the kernels deliver, for inputs in any layout."""
    from torch._subclasses import FakeTensorMode

    device_or_skip(device)
    for sizes in ((2, 6, 7, 9), (2, 6, 1, 1), (1, 1, 7, 9), (2, 6, 7, 1), (0, 6, 7, 9)):
        batch, _, rows, columns = sizes
        x, weight = torch.randn(sizes), torch.randn(batch, 1, 3, 3, rows, columns)
        x, weight, grad_out = (t.to(device) for t in LAYOUTS[layout](x, weight, torch.ones(sizes)))
        real = (
            torch.ops.fastib.involution(x, weight, 1, 1),
            *torch.ops.fastib.involution_backward(grad_out, x, weight, 1, 1),
        )
        with FakeTensorMode() as mode:
            x, weight, grad_out = map(mode.from_tensor, (x, weight, grad_out))
            fakes = (
                torch.ops.fastib.involution(x, weight, 1, 1),
                *torch.ops.fastib.involution_backward(grad_out, x, weight, 1, 1),
            )
        for a, b in zip(real, fakes, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
            assert a.stride() == b.stride() or a.numel() == 0, (sizes, a.stride(), b.stride())


def test_nothing_is_copied(backend):
    """NCHW, and channels_last throughout: no operator but involution's own runs, forward and backward."""
    if backend == "reference":
        pytest.skip("the reference unfolds")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    from torch.profiler import ProfilerActivity, profile

    for order in (lambda t: t, channels_last):
        x, weight = (order(t).requires_grad_() for t in inputs())
        grad_out = order(torch.ones(2, 6, 4, 5))
        seen = []
        with profile(activities=[ProfilerActivity.CPU]) as trace, Record():
            out = involution(x, weight, backend=backend, **OPTIONS)
            torch.autograd.grad(out, (x, weight), grad_out)
        names = {event.key for event in trace.key_averages()} | set(seen)
        assert not any(word in name for name in names for word in ("copy", "clone", "contiguous", "::to"))
