"""Layers that nothing replaced or listens to, in whose place the library's own kernels may run."""

from __future__ import annotations

from torch import Tensor, nn

from fastib.ops.linear import linear

__all__ = ["apply_linear", "has_hooks"]


def apply_linear(layer: nn.Module, x: Tensor, backend: str | None) -> Tensor:
    """`layer(x)` for x (B, P, I): of a plain `nn.Linear` on the CPU by `linear`, unless `backend` is another."""
    if x.is_cpu and backend in (None, "cpu") and type(layer) is nn.Linear and not has_hooks(layer):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def has_hooks(layer: nn.Module) -> bool:
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))
