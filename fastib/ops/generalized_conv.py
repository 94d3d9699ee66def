"""Generalized convolution (Bootstrapping ViTs, Eq. 3-4): the public function, its shift, and its fused products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastib.ops import _backend
from fastib.ops._arguments import autocast, check_device, check_dtype, check_optional, check_tensors, integer, invalid
from fastib.ops._backend import Op, below_autograd
from fastib.reference.generalized_conv import generalized_conv_ref

_NAME, _SHIFT = "generalized_conv", "generalized_conv_shift"
_BACKWARD = "generalized_conv_backward"
_FEW = 20480  # elements up to which PyTorch, with one thread, gives no convolution to oneDNN
_SLACK = 16  # kMiddleSlack of the kernels: elements behind the values
SCHEMAS = {
    _SHIFT: "(Tensor x, int num_heads, bool inverse) -> Tensor",
    _NAME: "(Tensor x, Tensor w_v, Tensor w_o, Tensor? bias, int num_heads, bool keep) -> (Tensor out, Tensor values)",
    _BACKWARD: (
        "(Tensor grad, Tensor x, Tensor w_v, Tensor w_o, Tensor values, int num_heads, bool need_x, bool need_v, "
        "bool need_o, bool need_bias) -> (Tensor grad_x, Tensor grad_w_v, Tensor grad_w_o, Tensor grad_bias)"
    ),
}


def generalized_conv(
    x: Tensor, w_v: Tensor, w_o: Tensor, bias: Tensor | None, num_heads: int, *, backend: str | None = None
) -> Tensor:
    """The convolution that has the value and output weights of an attention as its taps, one tap for each head.

    `y = bias + sum_h w_o[:, head h] shift_h(w_v[head h] x)` (Bootstrapping ViTs, Eq. 3-4), shift_h moving the image by
    tap h, zero outside. Taps: the first num_heads places, row by row, of a window of ceil(sqrt(num_heads)) squared,
    whose centre is at ((k - 1) // 2, (k - 1) // 2): an even window reaches one place further below and to the right. 9
    heads are a 3 x 3 convolution with padding 1, whose kernel is never made: two products a pixel, and one shift.

    x: (B, C, rows, columns), float32, bfloat16, float16 or float64, any strides; under autocast all inputs are cast.
    w_v: (M, C), M a multiple of num_heads: rows of head h are h M / num_heads and on. w_o: (O, M). bias: (O,), or None.
        In x's dtype.
    backend: None chooses; "reference", "cpu" or "cuda" insist.

    Returns (B, O, rows, columns) in x's dtype, channels_last where x is: then no dense image is copied. Differentiable
    any number of times, in x and all weights.

    Raises ValueError for a wrong shape, dtype or range, RuntimeError for a device or backend that does not fit.
    """
    check_tensors(_NAME, x=x, w_v=w_v, w_o=w_o)
    check_optional(_NAME, bias=bias)
    x, w_v, w_o, bias = autocast(x, w_v, w_o, bias)
    num_heads = integer(_NAME, "num_heads", num_heads, lowest=1)
    _check(x, w_v, w_o, bias, num_heads)
    if _OP.choose(backend, x) == "reference":
        return generalized_conv_ref(x, w_v, w_o, bias, num_heads)
    inputs = x, w_v, w_o, bias
    if not _fused(x):
        return _composed(*inputs, num_heads)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _GeneralizedConv.apply(*inputs, num_heads)
    with below_autograd():
        return _forward(*inputs, num_heads, False)[0]


def _fused(x: Tensor) -> bool:
    """Whether the products that shift what they write take `x`: float32 on the CPU, dense, many pixels."""
    if _backend.is_recorded() or not x.is_cpu or x.dtype != torch.float32 or x.numel() <= _FEW:
        return False
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _composed(x: Tensor, w_v: Tensor, w_o: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """Both products and the shift, each an operation of its own."""
    return _product(_shift(_product(x, w_v), num_heads), w_o, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight (O, C) times the channels of x (B, C, rows, columns), plus bias (O,), in x's memory format."""
    enough = _backend.is_recorded() or x.numel() > _FEW  # a program compiled or exported holds for any batch
    if x.device.type == "cpu" and x.dtype != torch.float64 and enough and weight.numel():
        return F.conv2d(x, weight[:, :, None, None], bias)  # oneDNN, which is faster than the BLAS on short channels
    if _backend.channels_last(x):
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    out = torch.bmm(weight.expand(x.shape[0], -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
    return out if bias is None else out.add_(bias[:, None, None])


def _check(x: Tensor, w_v: Tensor, w_o: Tensor, bias: Tensor | None, num_heads: int) -> None:
    if x.dim() != 4:
        raise invalid(_NAME, "x", "of shape (B, C, rows, columns)", tuple(x.shape))
    if w_v.dim() != 2 or w_v.shape[1] != x.shape[1]:
        raise invalid(_NAME, "w_v", f"of shape (M, C={x.shape[1]})", tuple(w_v.shape))
    if w_v.shape[0] % num_heads:
        raise invalid(_NAME, "w_v", f"of M rows, a multiple of num_heads={num_heads}", f"M={w_v.shape[0]}")
    if w_o.dim() != 2 or w_o.shape[1] != w_v.shape[0]:
        raise invalid(_NAME, "w_o", f"of shape (O, M={w_v.shape[0]})", tuple(w_o.shape))
    if bias is not None and bias.shape != w_o.shape[:1]:
        raise invalid(_NAME, "bias", f"None or of shape ({w_o.shape[0]},)", tuple(bias.shape))
    check_dtype(_NAME, "x", x)
    for name, tensor in {"w_v": w_v, "w_o": w_o, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise invalid(_NAME, name, f"{x.dtype} like x", tensor.dtype)
        check_device(_NAME, name, tensor, x.device)


def _shift(x: Tensor, num_heads: int, inverse: bool = False) -> Tensor:
    if _backend.is_recorded():
        return _shift_kernel(x, num_heads, inverse)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Shift.apply(x, num_heads, inverse)
    with below_autograd():
        return _shift_kernel(x, num_heads, inverse)


_shift_kernel = _backend.register(_SHIFT, SCHEMAS[_SHIFT], lambda x, *_: _backend.empty_image(x, *x.shape[2:]))
_OP = Op(_NAME, gpu="cuda", kernel=_SHIFT)


def _fake_forward(x: Tensor, w_v: Tensor, w_o: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    keep, (batch, _, *size) = args[-1], x.shape
    values = x.new_empty(batch * size[0] * size[1] * w_v.shape[0] + _SLACK if keep else 0)
    return _backend.empty_image(x, *size, w_o.shape[0]), values


def _fake_backward(grad: Tensor, x: Tensor, w_v: Tensor, w_o: Tensor, *args: Any) -> tuple[Tensor, ...]:
    need_x, need_v, need_o, need_bias = args[-4:]
    return (
        _backend.empty_image(x, *x.shape[2:]) if need_x else x.new_empty(0),
        x.new_empty(w_v.shape if need_v else 0),
        x.new_empty(w_o.shape if need_o or need_bias else 0),
        x.new_empty(w_o.shape[:1] if need_bias else 0),
    )


_forward = _backend.register(_NAME, SCHEMAS[_NAME], _fake_forward)
_backward = _backend.register(_BACKWARD, SCHEMAS[_BACKWARD], _fake_backward)


class _GeneralizedConv(torch.autograd.Function):
    """The fused products, once differentiable as such; further derivatives are those of `_composed`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, ctx.num_heads = args
        _, _, *of_values, _ = ctx.needs_input_grad
        with below_autograd():
            out, values = _forward(*args, any(of_values))
        ctx.save_for_backward(*inputs, values)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, values = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return (*_composed_gradients(inputs, ctx.num_heads, grad, needed), None)
        with below_autograd():
            gradients = _backward(grad, *inputs[:3], values, ctx.num_heads, *needed)
        return (*(t if need else None for t, need in zip(gradients, needed, strict=True)), None)


def _composed_gradients(
    inputs: list[Tensor | None], num_heads: int, grad: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    views = [t if t is None else t.view_as(t) for t in inputs]  # of which none depends on another
    wanted = [t for t, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(_composed(*views, num_heads), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


class _Shift(torch.autograd.Function):
    """The eager path; the dispatcher's own autograd serves compile and export."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_heads: int, inverse: bool) -> Tensor:
        ctx.num_heads, ctx.inverse = num_heads, inverse
        with below_autograd():
            return _shift_kernel(x, num_heads, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _shift(grad, ctx.num_heads, not ctx.inverse), None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.num_heads, ctx.inverse = inputs


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _shift_kernel(grad, ctx.num_heads, not ctx.inverse), None, None


torch.library.register_autograd(f"fastib::{_SHIFT}", _gradient, setup_context=_save, lib=_backend.LIBRARY)
