"""The attention modules' projections by our own products: as right as PyTorch's, and where they give way to it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import counted_linear
from torch import nn
from torch.nn.utils import prune

from fastib import _native
from fastib.nn import MHCA, HeadTokenAttention

MODULES = {"head tokens": lambda: HeadTokenAttention(24, 3), "convolutional": lambda: MHCA(24, 3, (3, 4), rpe_drop=0.0)}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def shaken(make) -> nn.Module:
    """With every parameter away from where it starts."""
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(5, 13, 24, generator=torch.Generator().manual_seed(seed))


@each_module
def test_values_and_gradients(monkeypatch, make):
    """In float32, at most twice as far from float64 as with PyTorch's products, in the mean square over eight inputs.

    One input's gradient to three alphas is three numbers, whose roundings are chance."""
    module, shapes = shaken(make), counted_linear(monkeypatch, "fastib.nn.plain")
    names = ("out", "grad_x", *dict(module.named_parameters()))

    def results(backend, dtype, seed):
        used, leaf = copy.deepcopy(module).to(dtype), tokens(seed).to(dtype).requires_grad_()
        used.backend = backend
        out = used(leaf)
        weight = tokens(100 + seed).to(dtype)
        return out, *torch.autograd.grad((out * weight).sum(), [leaf, *used.parameters()])

    def drawn(backend, dtype):
        draws = zip(*(results(backend, dtype, seed) for seed in range(8)), strict=True)
        return {name: torch.stack(draw) for name, draw in zip(names, draws, strict=True)}

    exact, plain = drawn("reference", torch.float64), drawn("reference", torch.float32)
    assert not shapes
    own = drawn(None, torch.float32)
    assert {shape for shape in shapes if shape[1] == 13} == {(5, 13, 24)}
    for name, true in exact.items():
        assert _native.lib_available() or torch.equal(own[name], plain[name])
        error, reference = ((t[name].double() - true).square().mean().sqrt() for t in (own, plain))
        rounding = torch.finfo(torch.float32).eps / 2 * true.square().mean().sqrt()
        assert error <= 2 * reference + rounding, f"{name}: error {error:.3e}, PyTorch's {reference:.3e}"


@each_module
def test_they_give_way(monkeypatch, make):
    """To hooks, pruned and replaced layers, and backend="reference"."""
    module, x, shapes, names = shaken(make), tokens(), counted_linear(monkeypatch, "fastib.nn.plain"), []
    expected = module(x)
    assert shapes.count((5, 13, 24)) == 2
    for name in ("qkv", "proj"):
        hook = getattr(module, name).register_forward_hook(lambda *_, name=name: names.append(name))
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        hook.remove()
    assert set(names) == {"qkv", "proj"}
    shapes.clear()
    prune.l1_unstructured(module.qkv, "weight", 0.5)
    doubled = Doubled(24, 24)
    doubled.load_state_dict({name: t / 2 for name, t in module.proj.state_dict().items()})
    module.proj, plain = doubled, module.proj
    module(x).sum().backward()
    assert not shapes
    prune.remove(module.qkv, "weight")
    module.proj, module.backend = plain, "reference"
    module(x)
    assert not shapes
