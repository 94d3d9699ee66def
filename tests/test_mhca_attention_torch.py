"""mhca_attention inside PyTorch: compile, export, autocast, checkpointing, opcheck, DDP and FSDP2, by value."""

import subprocess
import sys

import pytest
import torch
from helpers import max_error, value_and_grads
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastib import _native
from fastib.nn import MHCA
from fastib.ops import mhca_attention
from fastib.reference import mhca_attention_ref

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "-")),
]
COMPILERS = {"reference": "aot_eager", "cpu": "inductor"}  # Inductor's own loops are not what is tested here


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(batch=2, heads=3, grid=(3, 4), head_dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    tokens = 1 + grid[0] * grid[1]
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    alpha = torch.rand(heads, generator=generator)
    return [*qkv.unbind(0), alpha, torch.randn(heads, 2, generator=generator)]


def agree(actual, expected, tolerance=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and max_error(a, b) <= tolerance * max(1.0, b.abs().max().item())


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options", [{}, {"rpe_dropout": 0.2, "attn_dropout": 0.3, "seed": 7}], ids=["plain", "dropout"]
)
def test_compile(backend, options):
    """Forward and backward in one graph, with the values and gradients of eager."""

    def function(*x):
        return (
            mhca_attention(*(t * 1.5 for t in x), (3, 4), backend=backend, **options).transpose(1, 2).flatten(2).sin()
        )

    compiled = torch.compile(function, fullgraph=True, backend=COMPILERS[backend])
    grad_out = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(1))
    agree(value_and_grads(compiled, inputs(), grad_out), value_and_grads(function, inputs(), grad_out))
    with torch.no_grad():
        agree([compiled(*inputs())], [function(*inputs())])


def test_compile_draws_a_new_mask_per_call(backend):
    """The seed is drawn inside the graph, and the backward regenerates the mask of its own forward."""
    compiled = torch.compile(
        lambda q, k, v, a, c: mhca_attention(q, k, v, a, c, (3, 4), attn_dropout=0.5, backend=backend),
        fullgraph=True,
        backend=COMPILERS[backend],
    )
    q, k, v, alpha, center = inputs()
    ones = torch.ones_like(v).requires_grad_()
    sums = []
    for _ in range(2):
        out = compiled(q, k, ones, alpha, center)
        ones.grad = None
        out.backward(torch.ones_like(out))
        # Both are sums of the same dropped attention, over keys and then queries, or over queries and then keys.
        agree([ones.grad.sum((2, 3))], [out.detach().sum((2, 3))], 1e-5)
        sums.append(out.detach())
    assert not torch.equal(*sums)


def test_compile_with_a_changing_batch():
    compiled = torch.compile(lambda *x: mhca_attention(*x, (3, 4)), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 3, 1):
        agree(
            value_and_grads(compiled, inputs(batch)),
            value_and_grads(lambda *x: mhca_attention_ref(*x, (3, 4)), inputs(batch)),
        )


def test_compiled_module_under_autocast(backend):
    torch.manual_seed(0)
    module = MHCA(24, 3, (3, 4), rpe_drop=0.0, backend=backend)
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.randn(2, 13, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = module(x), compiled(x)
    assert actual.dtype == torch.bfloat16 and max_error(actual, expected) < 2e-2
    actual.float().sum().backward()
    assert module.alpha.grad.dtype == torch.float32 and module.alpha.grad.isfinite().all()


class Attend(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, alpha, center):
        return mhca_attention(q, k, v, alpha, center, (3, 4), backend=self.backend) + 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = ({0: batch}, {0: batch}, {0: batch}, None, None)
    program = torch.export.export(Attend(backend), tuple(inputs()), dynamic_shapes=dynamic, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ("fastib.mhca_attention.default" in targets) == (backend == "cpu")
    agree([program.module()(*inputs(4))], [Attend(backend)(*inputs(4))])
    agree([program.run_decompositions().module()(*inputs(4))], [Attend(backend)(*inputs(4))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """q, k and v are cast, whatever they were; alpha and center stay float32."""
    q, k, v, alpha, center = (t.requires_grad_() for t in inputs())
    with torch.autocast("cpu", dtype):
        out = mhca_attention(q, k.to(dtype), v, alpha, center, (3, 4), backend=backend)
        exempt = mhca_attention(*(t.double() for t in (q, k, v, alpha, center)), (3, 4), backend=backend)
    assert out.dtype == dtype and exempt.dtype == torch.float64
    out.float().sum().backward()
    expected = mhca_attention(
        *(t.detach().to(dtype) for t in (q, k, v)), alpha.detach(), center.detach(), (3, 4), backend=backend
    )
    assert torch.equal(out, expected)
    assert all(t.grad.dtype == torch.float32 for t in (q, k, v, alpha, center))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, reentrant):
    """The recomputed forward draws the same seed again."""

    def attend(*x):
        return mhca_attention(*x, (3, 4), rpe_dropout=0.3, attn_dropout=0.3, backend=backend)

    torch.manual_seed(5)
    expected = value_and_grads(attend, inputs())
    torch.manual_seed(5)
    leaves = [t.detach().clone().requires_grad_() for t in inputs()]
    out = checkpoint(attend, *leaves, use_reentrant=reentrant)
    out.backward(torch.ones_like(out))
    agree([out, *(t.grad for t in leaves)], expected, 0.0)


def test_selective_checkpoint_sees_the_operator():
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    context = lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(policy)  # noqa: E731
    leaves = [t.detach().requires_grad_() for t in inputs()]
    checkpoint(lambda *x: mhca_attention(*x, (3, 4)), *leaves, use_reentrant=False, context_fn=context).sum().backward()
    assert "fastib.mhca_attention.default" in seen


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_opcheck(device, dtype, dropout):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and not _native.lib_available():
        pytest.skip(_native.why_not())
    q, k, v, alpha, center = (t.to(device).detach() for t in inputs(dtype=dtype))
    q, k, v, alpha, center = (t.requires_grad_() for t in (q, k, v, alpha.float(), center.float()))
    seed = torch.tensor([3], device=device) if dropout else None
    options = (seed, 3, 4, 1, 0.3, dropout, dropout)
    torch.library.opcheck(torch.ops.fastib.mhca_attention, (q, k, v, alpha, center, *options), rtol=1e-2, atol=1e-2)
    out, stats = torch.ops.fastib.mhca_attention(q, k, v, alpha, center, *options)
    args = [t.detach() for t in (out, q, k, v, alpha, center, out, stats)]
    torch.library.opcheck(torch.ops.fastib.mhca_attention_backward, (*args, *options))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_layouts(device):
    """The fakes promise the strides that the kernels deliver, for inputs in any layout."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and not _native.lib_available():
        pytest.skip(_native.why_not())
    from torch._subclasses import FakeTensorMode

    for layout in (torch.Tensor.contiguous, torch.Tensor.clone, lambda t: t.mT.contiguous().mT):
        q, k, v, alpha, center = (t.to(device) for t in inputs())
        args = (layout(q), layout(k), layout(v), alpha, center, None, 3, 4, 1, 0.3, 0.0, 0.0)
        real = torch.ops.fastib.mhca_attention(*args)
        backward = (torch.ones_like(q), *args[:5], *real, *args[5:])
        grads = torch.ops.fastib.mhca_attention_backward(*backward)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in backward]
            fakes = (
                *torch.ops.fastib.mhca_attention(*fake[1:6], *fake[8:]),
                *torch.ops.fastib.mhca_attention_backward(*fake),
            )
        for a, b in zip((*real, *grads), fakes, strict=True):
            assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype and a.device == b.device


def test_meta_tensors(backend):
    """Shapes flow through without data, as when a model is counted or built on the meta device."""
    out = mhca_attention(*(t.to("meta") for t in inputs()), (3, 4), rpe_dropout=0.1)
    assert out.device.type == "meta" and out.shape == (2, 3, 13, 8)


def test_saves_no_attention_matrix():
    """What a training step keeps grows with N, not N^2 (design: at most one (H, N, N) table, and here none)."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mhca_attention(*(t.requires_grad_() for t in inputs(1, 2, (20, 20), 8)), 20, rpe_dropout=0.1, attn_dropout=0.1)
    assert max(saved) == 2 * 401 * 8


PARALLEL = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from fastib.nn import MHCA

def model():
    torch.manual_seed(0)
    return nn.Sequential(MHCA(24, 3, (3, 4), rpe_drop=0.0), nn.LayerNorm(24), MHCA(24, 3, (3, 4), rpe_drop=0.0))

dist.init_process_group("gloo")
rank = dist.get_rank()
data = torch.randn(4, 13, 24, generator=torch.Generator().manual_seed(1))
single = model()
single(data).square().mean().backward()
parallel = model()
if sys.argv[1] == "ddp":
    parallel = nn.parallel.DistributedDataParallel(parallel)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for module in (parallel[0], parallel[2], parallel):
        fully_shard(module, mesh=mesh)
parallel(data[2 * rank : 2 * rank + 2]).square().mean().backward()
for (name, p), s in zip(parallel.named_parameters(), single.parameters(), strict=True):
    grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    assert torch.allclose(grad, s.grad, atol=1e-6, rtol=1e-4), (name, (grad - s.grad).abs().max())
print("same gradients", flush=True)
dist.barrier()  # neither leaves while the other still talks to it
dist.destroy_process_group()
os._exit(0)  # torch's own threads now and then abort the interpreter's end
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind, tmp_path):
    """Two processes with half the batch each get the gradients of one with all of it."""
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[:6000] + result.stderr[-2000:]
    assert result.stdout.count("same gradients") == 2
