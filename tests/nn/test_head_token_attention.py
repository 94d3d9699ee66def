"""HeadTokenAttention: the paper's own order of operations, what the head tokens see, sizes and errors."""

import pytest
import torch
from torch.nn import functional as F

from fastib.nn import HeadTokenAttention
from fastib.ops import head_token_attention


def shaken(*args, **kwargs) -> HeadTokenAttention:
    """In float64, with every parameter away from where it starts."""
    torch.manual_seed(0)
    module = HeadTokenAttention(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def tokens(batch: int, count: int, dim: int) -> torch.Tensor:
    x = torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def published(module: HeadTokenAttention, x: torch.Tensor) -> torch.Tensor:
    """Concatenate, attend, project all N + h rows, average, add (Fig. 3), head token by head token."""
    dim, heads, d = x.shape[2], module.num_heads, module.head_dim
    rows = []
    for t in range(heads):
        mean = x[:, :, t * d : (t + 1) * d].mean(1)
        token = mean @ module.head_proj.weight.T + module.head_proj.bias
        groups = [
            F.layer_norm(token[:, g * d : (g + 1) * d], (d,), module.head_norm.weight, module.head_norm.bias, 1e-5)
            for g in range(heads)
        ]
        rows.append(F.gelu(torch.cat(groups, 1)) + module.head_embed[0, t])
    sequence = torch.cat([x, torch.stack(rows, 1)], 1)
    qkv = sequence @ module.qkv.weight.T
    if module.qkv.bias is not None:
        qkv = qkv + module.qkv.bias
    outputs = []
    for h in range(heads):
        q, k, v = (qkv[:, :, i * dim + h * d : i * dim + (h + 1) * d] for i in range(3))
        outputs.append((q @ k.transpose(1, 2) / d**0.5).softmax(-1) @ v)
    out = torch.cat(outputs, 2) @ module.proj.weight.T
    if module.proj.bias is not None:
        out = out + module.proj.bias
    n = x.shape[1]
    return torch.cat([out[:, :1] + out[:, n:].mean(1, keepdim=True), out[:, 1:n]], 1)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("dim", "heads", "count"), [(12, 3, 10), (8, 1, 5), (16, 4, 1), (48, 8, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_published_order_of_operations(dim, heads, count, bias, backend):
    """Value and every gradient, in float64."""
    module = shaken(dim, heads, qkv_bias=bias, proj_bias=bias, backend=backend)
    x = tokens(3, count, dim)
    leaves = [x, *module.parameters()]
    out, expected = module(x), published(module, x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    exact = torch.autograd.grad((expected * weight).sum(), leaves)
    assert all(g.abs().max() > 0 for g in exact)
    torch.testing.assert_close(gradients, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dim", "heads", "count"), [(192, 4, 158_496), (192, 3, 161_408), (384, 8, 613_344)])
def test_parameter_counts(dim, heads, count):
    """Paper's table: 10,272, 13,184 and 21,984 above plain self-attention."""
    plain = 4 * dim * dim + 4 * dim
    extra = {(192, 4): 10_272, (192, 3): 13_184, (384, 8): 21_984}[dim, heads]
    assert sum(p.numel() for p in HeadTokenAttention(dim, heads).parameters()) == plain + extra == count


def test_head_tokens_see_the_class_token():
    """The mean runs over all tokens; a change of the class token's group t changes head token t alone."""
    module, x = shaken(12, 3), tokens(2, 7, 12).detach()
    moved = x.clone()
    moved[:, 0, 4:8] += 1
    difference = (module.head_tokens(moved) - module.head_tokens(x)).abs().amax((0, 2))
    assert difference[1] > 1e-3 and difference[0] == 0 and difference[2] == 0


def test_head_attention_is_that_of_the_forward_pass():
    """The rows of the head tokens in the attention over all N + h tokens."""
    module, x = shaken(12, 3), tokens(2, 7, 12).detach()
    sequence = torch.cat([x, module.head_tokens(x)], 1)
    q, k, _ = (sequence @ module.qkv.weight.T + module.qkv.bias).view(2, 10, 3, 3, 4).permute(2, 0, 3, 1, 4)
    attn = (q @ k.transpose(2, 3) / 2).softmax(-1)[:, :, 7:, :7]
    torch.testing.assert_close(module.head_attention(x), attn.transpose(1, 2).float(), rtol=1e-5, atol=1e-6)


def test_dropout_in_training_alone():
    module, x = shaken(12, 3, attn_drop=0.5, proj_drop=0.25), tokens(2, 7, 12)
    assert torch.equal(module.eval()(x), module(x))
    torch.manual_seed(3)
    first = module.train()(x)
    torch.manual_seed(3)
    assert torch.equal(first, module(x)) and not torch.equal(first, module(x))
    torch.manual_seed(3)
    q, k, v = module._project(x)
    out = head_token_attention(q, k, v, *module._project(module.head_tokens(x)), attn_dropout=0.5)
    out = module.proj(out.transpose(1, 2).flatten(2))
    out = torch.cat([out[:, :1] + module.proj.bias, out[:, 1:]], 1)
    torch.testing.assert_close(first, F.dropout(out, 0.25), rtol=1e-12, atol=1e-12)


def test_autocast_and_compile():
    module, x = shaken(12, 3).float(), tokens(2, 7, 12).detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), rtol=0.1, atol=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim=10, num_heads=3"):
        HeadTokenAttention(10, 3)
    module = HeadTokenAttention(12, 3)
    for masked in ({"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask must be None and is_causal False"):
            module(torch.zeros(1, 5, 12), **masked)


def test_hooks_on_the_projection_keep_what_they_saw():
    """Full backward hooks on every layer work, and an output taken by a hook does not change afterwards."""
    module, x = shaken(12, 3), tokens(2, 7, 12)
    expected = published(module, x)
    seen = []
    module.proj.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    for layer in module.modules():
        layer.register_full_backward_hook(lambda *_: None)
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    projected, result = seen[0]
    torch.testing.assert_close(result, F.linear(projected, module.proj.weight, module.proj.bias), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (exact,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-8)
