"""mhca_attention on a GPU: what only a GPU has (graphs, streams, several devices, memory), by value."""

import pytest
import torch
from helpers import max_error, value_and_grads

from fastib.nn import MHCA
from fastib.ops import mhca_attention
from fastib.reference import mhca_attention_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OPTIONS = {"rpe_dropout": 0.2, "attn_dropout": 0.3, "seed": 7}


def inputs(batch=4, heads=3, grid=(14, 14), head_dim=32, dtype=torch.bfloat16, device="cuda"):
    generator = torch.Generator().manual_seed(3)
    tokens = 1 + grid[0] * grid[1]
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).to(device, dtype).permute(2, 0, 3, 1, 4)
    alpha = torch.rand(heads, generator=generator).to(device)
    return [*qkv.unbind(0), alpha, torch.randn(heads, 2, generator=generator).to(device)]


def exact(x, grid, **options):
    return value_and_grads(lambda *t: mhca_attention_ref(*t, grid, **options), [t.detach().cpu().double() for t in x])


def close(actual, expected, tolerance=2e-2):
    for a, b in zip(actual, expected, strict=True):
        assert max_error(a, b) <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "dropout"])
def test_default_backend_is_triton(dtype, options):
    x = inputs(dtype=dtype)
    by_default = value_and_grads(lambda *t: mhca_attention(*t, 14, **options), x)
    by_name = value_and_grads(lambda *t: mhca_attention(*t, 14, backend="triton", **options), x)
    assert all(torch.equal(a, b) for a, b in zip(by_default, by_name, strict=True))
    close(by_default, exact(x, (14, 14), **options))


def test_cuda_graph_replays_new_masks():
    """A captured training step: right values for what is in the inputs at replay, and other masks at each replay."""
    x = [t.requires_grad_() for t in inputs()]
    q, _, v, *_ = x
    grad_out = torch.ones_like(q)

    def step(**options):
        for t in x:
            t.grad = None
        out = mhca_attention(*x, 14, **options)
        out.backward(grad_out)
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(attn_dropout=0.5)
            step()
    torch.cuda.current_stream().wait_stream(side)

    plain = torch.cuda.CUDAGraph()
    with torch.cuda.graph(plain):
        out = step()
    grads = [t.grad for t in x]
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    plain.replay()
    torch.cuda.synchronize()
    close([out, *grads], exact(x, (14, 14)))

    dropped = torch.cuda.CUDAGraph()
    with torch.no_grad():
        v.fill_(1.0)
    with torch.cuda.graph(dropped):
        out = step(attn_dropout=0.5)
    grad_v = v.grad
    seen = []
    for _ in range(3):
        dropped.replay()
        torch.cuda.synchronize()
        seen.append(out.clone())
        # The same dropped attention, summed over keys then queries and over queries then keys.
        close([grad_v.float().sum((2, 3))], [out.float().sum((2, 3))], 5e-3)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_streams():
    """Each call runs on the current stream, and its backward on the stream of its forward."""
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    x = inputs()
    expected = value_and_grads(lambda *t: mhca_attention(*t, 14, **OPTIONS), x)
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = [t + 0 for t in x]
            results.append(value_and_grads(lambda *t: mhca_attention(*t, 14, **OPTIONS), late))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    x = inputs()
    expected = value_and_grads(lambda *t: mhca_attention(*t, 14, **OPTIONS), x)
    with torch.cuda.device(0):
        actual = value_and_grads(lambda *t: mhca_attention(*t, 14, **OPTIONS), [t.to("cuda:1") for t in x])
    assert all(t.device == torch.device("cuda:1") for t in actual)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(RuntimeError, match="k must be on cuda:0 like the other inputs, got cuda:1"):
        mhca_attention(x[0], x[1].to("cuda:1"), *x[2:], 14)


def test_no_synchronisation():
    """Neither the forward nor the backward waits for the GPU, with the seed drawn or given."""
    x = [t.requires_grad_() for t in inputs()]
    for options in ({}, OPTIONS, {"rpe_dropout": 0.1, "attn_dropout": 0.1}):
        mhca_attention(*x, 14, **options).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            mhca_attention(*x, 14, **options).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_same_bits_twice():
    x = inputs(8, 6)
    first, second = (value_and_grads(lambda *t: mhca_attention(*t, 14, **OPTIONS), x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_grows_with_tokens():
    """Beyond inputs and gradients a training step needs no tensor of B * H * N * N elements."""
    batch, heads, side = 16, 4, 32
    x = [t.requires_grad_() for t in inputs(batch, heads, (side, side), 16)]
    mhca_attention(*x, side, rpe_dropout=0.1).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mhca_attention(*x, side, rpe_dropout=0.1).sum().backward()
    tokens = side * side + 1
    assert torch.cuda.max_memory_allocated() - before < batch * heads * tokens * tokens * 2 / 2


def test_large_offsets():
    """More than 2^31 elements in a tensor: the last image is right."""
    batch, heads, head_dim = 700, 128, 128
    tokens = 1 + 14 * 14
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    assert batch * heads * tokens * head_dim > 2**31
    q = torch.empty(batch, heads, tokens, head_dim, dtype=torch.bfloat16, device="cuda").normal_()
    alpha, center = torch.ones(heads, device="cuda"), torch.zeros(heads, 2, device="cuda")
    with torch.no_grad():
        out = mhca_attention(q, q, q, alpha, center, 14)
    last = q[-1:, -2:].cpu().double()
    expected = mhca_attention_ref(last, last, last, alpha[-2:].cpu().double(), center[-2:].cpu().double(), 14)
    assert max_error(out[-1:, -2:], expected) < 3e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_module(mode):
    torch.manual_seed(0)
    module = MHCA(96, 3, 14, rpe_drop=0.0, device="cuda")
    x = torch.randn(4, 197, 96, device="cuda")
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):
        module.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            actual = compiled(x)
        actual.float().square().sum().backward()
    alpha_grad = module.alpha.grad.clone()
    module.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        expected = module(x)
    expected.float().square().sum().backward()
    close([actual, alpha_grad], [expected, module.alpha.grad], 3e-2)
