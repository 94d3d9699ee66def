"""Attention links (AAL, Eq. 4-5): the public functions, their autograd and their registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastib.ops import _backend
from fastib.ops._arguments import (
    autocast,
    check_device,
    check_dtype,
    check_finite,
    check_optional,
    check_tensors,
    invalid,
)
from fastib.ops._backend import Op, below_autograd
from fastib.reference.attention_link import attention_link_loss_ref, augment_attention_ref

_NAME = "attention_link_loss"
_INPUTS = "Tensor attn, Tensor weight, Tensor bias, Tensor target, Tensor? mask, float eps"
_GRADIENTS = "Tensor grad_attn, Tensor grad_weight, Tensor grad_bias"
SCHEMAS = {
    "attention_link_loss": f"({_INPUTS}) -> Tensor",
    "attention_link_loss_backward": f"(Tensor grad, {_INPUTS}) -> ({_GRADIENTS})",
    "attention_link_loss_and_gradients": f"({_INPUTS}) -> (Tensor loss, {_GRADIENTS})",
}


def attention_link_loss(
    attn: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Distance of linearly combined attention maps from a teacher's feature maps (AAL, Eq. 4-5).

    `a = weight attn + bias`; `loss = reduction of (a / |a| - t / |t|)^2`, norms over the S positions of a map. The
    combined maps a are never stored.

    attn: (B, M, S), M = layers * heads maps of S positions. target: (B, C, S), a constant. Same dtype: float32,
        bfloat16, float16 or float64, any strides; under autocast they are cast to its dtype.
    weight: (C, M). bias: (C,). Any floating dtype; float32 (float64 where attn is). Where attn is 16-bit, weight is
        rounded to its dtype for the products, as autocast does; all sums are float32.
    mask: (C, M) bool, the links kept; all where None. Links left out get no gradient.
    reduction: "mean" or "sum" over (B, C, S), or "none": the (B, C) sums over S.
    eps: a norm counts as at least this.
    backend: None chooses; "reference", "cpu" or "triton" insist.

    Returns a scalar, or (B, C), in float32 (float64). Differentiable once, in attn, weight and bias.

    Raises ValueError for a wrong shape, dtype or range or a target that requires grad, RuntimeError for a device or
    backend that does not fit.
    """
    check_tensors(_NAME, attn=attn, weight=weight, bias=bias, target=target)
    attn, target = autocast(attn, target)
    _check(attn, weight, bias, mask, target=target)
    if reduction not in ("mean", "sum", "none"):
        raise invalid(_NAME, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    check_finite(_NAME, "eps", eps)
    if eps < 0:
        raise invalid(_NAME, "eps", "not negative", eps)
    if _OP.choose(backend, attn) == "reference":
        return attention_link_loss_ref(attn, weight, bias, target, mask=mask, reduction=reduction, eps=eps)
    sums = torch.promote_types(attn.dtype, torch.float32)
    args = (attn, weight.to(sums), bias.to(sums), target, mask, eps)
    recorded = _backend.is_recorded()
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in args[:3])
    if trains and not recorded:
        loss = _LinkLoss.apply(*args) if reduction == "none" else _LinkLossSum.apply(_backend.tie(*args[:3]), *args)
    elif recorded:
        loss = _forward(*args)
    else:
        with below_autograd():
            loss = _forward(*args)
    if reduction == "none":
        return loss
    return loss.sum() / target.numel() if reduction == "mean" else loss.sum()


def augment_attention(attn: Tensor, weight: Tensor, bias: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The combined maps themselves, `weight attn + bias`, for pictures (AAL, Eq. 4): (B, C, S), float32 or float64.

    Arguments and errors as for `attention_link_loss`. Plain PyTorch.
    """
    check_tensors(_NAME, attn=attn, weight=weight, bias=bias)
    (attn,) = autocast(attn)
    _check(attn, weight, bias, mask)
    return augment_attention_ref(attn, weight, bias, mask)


def _check(attn: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, **target: Tensor) -> None:
    """target: where the function takes one."""
    check_optional(_NAME, mask=mask)
    if attn.dim() != 3:
        raise invalid(_NAME, "attn", "of shape (B, M, S)", tuple(attn.shape))
    batch, maps, positions = attn.shape
    if weight.dim() != 2 or weight.shape[1] != maps:
        raise invalid(_NAME, "weight", f"of shape (C, M={maps})", tuple(weight.shape))
    channels = weight.shape[0]
    shapes = {"bias": (channels,), "mask": (channels, maps), "target": (batch, channels, positions)}
    others = {"bias": bias, **target} if mask is None else {"bias": bias, "mask": mask, **target}
    for name, tensor in others.items():
        if tensor.shape != shapes[name]:
            raise invalid(_NAME, name, f"of shape {shapes[name]}", tuple(tensor.shape))
    check_dtype(_NAME, "attn", attn)
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if not tensor.is_floating_point():
            raise invalid(_NAME, name, "floating point", tensor.dtype)
    for tensor in target.values():
        if tensor.dtype != attn.dtype:
            raise invalid(_NAME, "target", f"{attn.dtype} like attn", tensor.dtype)
        if tensor.requires_grad:
            raise invalid(_NAME, "target", "a constant", "a tensor that requires grad")
    if mask is not None and mask.dtype != torch.bool:
        raise invalid(_NAME, "mask", "bool", mask.dtype)
    for name, tensor in {"weight": weight, **others}.items():
        check_device(_NAME, name, tensor, attn.device)


def _forward_fake(attn: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((attn.shape[0], weight.shape[0]))


def _backward_fake(grad: Tensor, attn: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return attn.new_empty(attn.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _both_fake(attn: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _forward_fake(attn, weight), *_backward_fake(attn, attn, weight, bias)


_FORWARD, _BACKWARD, _BOTH = SCHEMAS
_forward = _backend.register(_FORWARD, SCHEMAS[_FORWARD], _forward_fake, "attention_link.attention_link_fwd")
_backward = _backend.register_backward(
    _NAME, _BACKWARD, SCHEMAS[_BACKWARD], _backward_fake, "attention_link.attention_link_bwd"
)
_both = _backend.register(_BOTH, SCHEMAS[_BOTH], _both_fake, "attention_link.attention_link_both")
_OP = Op(_NAME, gpu="triton")


class _LinkLoss(torch.autograd.Function):
    """(B, C) sums; the backward makes the combined maps again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with below_autograd():
            loss = _forward(*args)
        _save(ctx, args, loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


class _LinkLossSum(torch.autograd.Function):
    """Their sum, whose gradients come with it: one pass over the maps in all."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, *args: Any) -> Tensor:
        with below_autograd():
            loss, *gradients = _both(*args)
        ctx.save_for_backward(tie, *gradients)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tie, *gradients = ctx.saved_tensors
        with torch.no_grad():  # times grad in its own type: float16 may not hold it
            gradients = [(g.to(grad.dtype) * grad).to(g.dtype) for g in gradients]
        return (None, *_backend.once(_NAME, tie, *gradients), None, None, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None)


torch.library.register_autograd(f"fastib::{_NAME}", _gradients, setup_context=_save, lib=_backend.LIBRARY)
