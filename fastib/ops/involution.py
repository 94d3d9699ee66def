"""Involution (Li et al. 2021; Co-advise, Sec. 3): the public function, its autograd and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastib.ops import _backend
from fastib.ops._arguments import autocast, check_device, check_dtype, check_tensors, integer, invalid
from fastib.ops._backend import Op, below_autograd
from fastib.reference.involution import involution_ref

_NAME = "involution"
SCHEMAS = {
    "involution": "(Tensor x, Tensor weight, int stride, int dilation) -> Tensor",
    "involution_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight, int stride, int dilation) -> (Tensor grad_x, Tensor grad_weight)"
    ),
}


def involution(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, backend: str | None = None) -> Tensor:
    """A convolution whose K x K kernel differs from place to place and is shared by the channels of a group.

    `y[b, c, i, j] = sum_uv weight[b, c // (C / G), u, v, i, j] x[b, c, i s + (u - K // 2) d, j s + (v - K // 2) d]`
    with s = stride and d = dilation, x being zero outside (Li et al. 2021, Eq. 4).

    x: (B, C, Hi, Wi), C a multiple of G; float32, bfloat16, float16 or float64, any strides; under autocast x and
        weight are cast to its dtype.
    weight: (B, G, K, K, Ho, Wo), K odd, Ho = ceil(Hi / stride), Wo = ceil(Wi / stride); in x's dtype.
    stride: step between the places of neighbouring results, in pixels. dilation: step between taps, in pixels.
    backend: None chooses; "reference", "cpu" or "cuda" insist.

    Returns (B, C, Ho, Wo) in x's dtype, channels_last where x is. Nothing is copied where x is contiguous and so is
    weight, and where x is channels_last and weight is a view of a channels_last (B, G K K, Ho, Wo).
    Differentiable once, in x and weight; "reference" any number of times.

    Raises ValueError for a wrong shape, dtype or range, RuntimeError for a device or backend that does not fit.
    """
    check_tensors(_NAME, x=x, weight=weight)
    x, weight = autocast(x, weight)
    stride, dilation = _step("stride", stride), _step("dilation", dilation)
    _check(x, weight, stride)
    if _OP.choose(backend, x) == "reference":
        return involution_ref(x, weight, stride=stride, dilation=dilation)
    if _backend.is_recorded():
        return _forward(x, weight, stride, dilation)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Involution.apply(x, weight, stride, dilation)
    with below_autograd():
        return _forward(x, weight, stride, dilation)


def _step(name: str, value: int) -> int:
    value = integer(_NAME, name, value, lowest=1)
    if value >= 1 << 20:
        raise invalid(_NAME, name, "below 2^20", value)
    return value


def _check(x: Tensor, weight: Tensor, stride: int) -> None:
    if x.dim() != 4:
        raise invalid(_NAME, "x", "of shape (B, C, Hi, Wi)", tuple(x.shape))
    if weight.dim() != 6:
        raise invalid(_NAME, "weight", "of shape (B, G, K, K, Ho, Wo)", tuple(weight.shape))
    batch, channels, rows, columns = x.shape
    groups, kernel = weight.shape[1:3]
    out_rows, out_columns = _out_size(rows, stride), _out_size(columns, stride)
    if weight.shape != (batch, groups, kernel, kernel, out_rows, out_columns):
        expected = (
            f"of shape ({batch}, G, K, K, {out_rows}, {out_columns}), as x is {tuple(x.shape)} and stride={stride}"
        )
        raise invalid(_NAME, "weight", expected, tuple(weight.shape))
    if kernel % 2 == 0:
        raise invalid(_NAME, "weight", "of an odd K", f"K={kernel}")
    if channels % groups if groups else channels:
        raise invalid(_NAME, "x", f"of C channels, a multiple of weight's G={groups} groups", f"C={channels}")
    check_dtype(_NAME, "x", x)
    if weight.dtype != x.dtype:
        raise invalid(_NAME, "weight", f"{x.dtype} like x", weight.dtype)
    check_device(_NAME, "weight", weight, x.device)


def _out_size(size: int, stride: int) -> int:
    return (size + stride - 1) // stride


def _forward_fake(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return _backend.empty_image(x, *weight.shape[4:])


def _backward_fake(grad_out: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    if _backend.channels_last(x):
        batch, groups, kernel, _, rows, columns = weight.shape
        grad_weight = x.new_empty((batch, rows, columns, groups, kernel, kernel)).permute(0, 3, 4, 5, 1, 2)
    else:
        grad_weight = x.new_empty(weight.shape)
    return _backend.empty_image(x, *x.shape[2:]), grad_weight


_forward = _backend.register(_NAME, SCHEMAS[_NAME], _forward_fake)
_backward = _backend.register_backward(_NAME, "involution_backward", SCHEMAS["involution_backward"], _backward_fake)
_OP = Op(_NAME, gpu="cuda")


class _Involution(torch.autograd.Function):
    """The eager path: a third of the host time of the dispatcher's own autograd, which serves compile and export."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with below_autograd():
            out = _forward(*args)
        _save(ctx, args, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *options = inputs
    ctx.save_for_backward(x, weight)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 4
    return (*_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None)


torch.library.register_autograd(f"fastib::{_NAME}", _gradients, setup_context=_save, lib=_backend.LIBRARY)
