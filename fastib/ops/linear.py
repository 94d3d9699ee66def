"""A linear layer whose products are the library's own, for modules that spend their time in them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastib import _native
from fastib.ops import _backend
from fastib.ops._arguments import check_device, check_optional, check_tensors, invalid, is_autocast_enabled
from fastib.ops._backend import Op, below_autograd

_NAME = "linear"
_FEW = 1 << 24  # multiply-adds below which packing the weight is not worth its while
_LARGEST = 1 << 22  # elements of a weight, of which each thread keeps a packed copy
_SHARE = 32  # of a weight's wider side for each thread; with less, too many of them wait for its gradient
SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_backward": (
        "(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, by our own products in float32 on the CPU where `has_own_products`, else `F.linear`.

    x: (B, P, I), any strides: it is copied only where its last dimension is not dense. weight: (O, I). bias: (O,), or
    None. Returns (B, P, O). The products have a first derivative alone.

    Raises ValueError for shapes that do not fit, RuntimeError for devices that differ.
    """
    check_tensors(_NAME, x=x, weight=weight)
    check_optional(_NAME, bias=bias)
    if x.dim() != 3:
        raise invalid(_NAME, "x", "of shape (B, P, I)", tuple(x.shape))
    if weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise invalid(_NAME, "weight", f"of shape (O, I={x.shape[2]})", tuple(weight.shape))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise invalid(_NAME, "bias", f"None or of shape ({weight.shape[0]},)", tuple(bias.shape))
    inputs = x, weight, bias
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None:
            check_device(_NAME, name, tensor, x.device)
    if not has_own_products(*inputs):
        return F.linear(*inputs)
    if _backend.is_recorded():
        return _forward(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Linear.apply(*inputs)
    with below_autograd():
        return _forward(*inputs)


def has_own_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` computes this by our own products: not what is small, nor in a program that is exported."""
    if not _HAS_KERNEL or not x.is_cpu or is_autocast_enabled(x) or Op._missing_rule() is not None:
        return False
    if any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias)):
        return False
    if weight.numel() > _LARGEST or _backend.may_train_later():  # a program that may be moved to another device
        return False
    if _backend.is_recorded():  # for any batch and any number of threads
        return True
    busy = max(weight.shape) >= _SHARE * torch.get_num_threads()
    return busy and x.numel() * weight.shape[0] >= _FEW


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0]))


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[:1] if need_bias else 0),
    )


_forward = _backend.register(_NAME, SCHEMAS["linear"], _fake)
_backward = _backend.register_backward(_NAME, "linear_backward", SCHEMAS["linear_backward"], _fake_backward)
_HAS_KERNEL = _native.lib_available() and torch._C._dispatch_has_kernel_for_dispatch_key("fastib::linear", "CPU")


class _Linear(torch.autograd.Function):
    """The eager path; the dispatcher's own autograd serves compile."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        with below_autograd():
            out = _forward(*inputs)
        _save(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors, x, weight, bias and weight)
    if bias and not weight:  # which is summed on the way to the weight's
        grad_bias = grad.sum((0, 1))
    return grad_x if x else None, grad_weight if weight else None, grad_bias if bias else None


torch.library.register_autograd(f"fastib::{_NAME}", _gradients, setup_context=_save, lib=_backend.LIBRARY)
