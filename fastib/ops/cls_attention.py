"""The class token's attention maps (AAL, Eq. 3): the public function, its autograd and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastib import _gpu_limits as limits
from fastib.ops import _backend
from fastib.ops._arguments import (
    autocast,
    check_device,
    check_dtype,
    check_finite,
    check_tensors,
    default_scale,
    integer,
    invalid,
)
from fastib.ops._backend import Op, below_autograd
from fastib.reference.cls_attention import cls_attention_maps_ref

_NAME = "cls_attention_maps"
SCHEMAS = {
    "cls_attention": (
        "(Tensor q, Tensor k, int num_prefix_tokens, float scale, bool over_all, bool maps_only) -> Tensor"
    ),
    "cls_attention_backward": (
        "(Tensor grad, Tensor q, Tensor k, Tensor probs, float scale) -> (Tensor grad_q, Tensor grad_k)"
    ),
}


def cls_attention_maps(
    q: Tensor,
    k: Tensor,
    *,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    over: str = "patches",
    backend: str | None = None,
) -> Tensor:
    """Attention of the class token's query to the patches, at the cost of one row (AAL, Eq. 3).

    q: (B, H, D), the class token's query. k: (B, H, N, D), the keys of all tokens, prefix tokens first. float32,
        bfloat16, float16 or float64, any strides; under autocast they are cast to its dtype.
    num_prefix_tokens: tokens before the patches.
    scale: factor of the dot products; D^-1/2 where None. 1 is Eq. 3 as printed.
    over: "patches", softmax over the patches alone, as in the paper; "all", over all keys and then cut to the patches:
        what the model itself attends to.
    backend: None chooses; "reference", "cpu" or "triton" insist.

    Returns (B, H, N - num_prefix_tokens) in the dtype of q. Differentiable once; "reference" any number of times.

    Raises ValueError for a wrong shape, dtype or range, RuntimeError for a device or backend that does not fit.
    """
    check_tensors(_NAME, q=q, k=k)
    q, k = autocast(q, k)
    num_prefix_tokens = integer(_NAME, "num_prefix_tokens", num_prefix_tokens)
    _check(q, k, num_prefix_tokens)
    if scale is None:
        scale = default_scale(q.shape[2])
    else:
        check_finite(_NAME, "scale", scale)
    if over not in ("patches", "all"):
        raise invalid(_NAME, "over", "'patches' or 'all'", repr(over))
    if _OP.choose(backend, k) == "reference":
        return cls_attention_maps_ref(q, k, num_prefix_tokens=num_prefix_tokens, scale=scale, over=over)
    args = (q, k, num_prefix_tokens, scale, over == "all")
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if _backend.is_recorded():
        if trains or _backend.may_train_later():
            return _cut(_forward(*args, False), num_prefix_tokens, q.dtype)
        return _forward(*args, True)
    if trains:
        return _ClsAttention.apply(*args)
    with below_autograd():
        return _forward(*args, True)


def _check(q: Tensor, k: Tensor, num_prefix_tokens: int) -> None:
    shape, dtype = k.shape, q.dtype
    if len(shape) != 4:
        raise invalid(_NAME, "k", "of shape (B, H, N, D)", tuple(shape))
    B, H, N, D = shape
    if q.shape != (B, H, D):
        raise invalid(_NAME, "q", f"of shape {(B, H, D)}, as k is {tuple(shape)}", tuple(q.shape))
    check_dtype(_NAME, "q", q)
    if k.dtype != dtype:
        raise invalid(_NAME, "k", f"{dtype} like q", k.dtype)
    check_device(_NAME, "k", k, q.device)
    if num_prefix_tokens > N:
        raise invalid(_NAME, "num_prefix_tokens", f"in [0, N={N}]", num_prefix_tokens)


def _forward_fake(q: Tensor, k: Tensor, num_prefix_tokens: int, _scale: float, _all: bool, maps_only: bool) -> Tensor:
    """For training all probabilities, unrounded: the gradient of a softmax needs those whose sum is 1."""
    batch, heads, tokens, _ = k.shape
    if maps_only:
        return k.new_empty((batch, heads, tokens - num_prefix_tokens))
    return k.new_empty((batch, heads, tokens), dtype=torch.promote_types(k.dtype, torch.float32))


def _cut(probs: Tensor, num_prefix_tokens: int, dtype: torch.dtype) -> Tensor:
    return probs.narrow(2, num_prefix_tokens, probs.shape[2] - num_prefix_tokens).to(dtype)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_dim = k.shape
    return q.new_empty(q.shape), k.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


_forward = _backend.register(
    "cls_attention", SCHEMAS["cls_attention"], _forward_fake, "cls_attention.cls_attention_fwd"
)
_backward = _backend.register_backward(
    _NAME,
    "cls_attention_backward",
    SCHEMAS["cls_attention_backward"],
    _backward_fake,
    "cls_attention.cls_attention_bwd",
)
_OP = Op(_NAME, gpu="triton", kernel="cls_attention", gpu_limits=limits.attention)


class _ClsAttention(torch.autograd.Function):
    """The eager path; the dispatcher's own autograd serves compile and export."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, _, num_prefix_tokens, *_ = args
        with below_autograd():
            probs = _forward(*args, False)
        _save(ctx, (*args, False), probs)
        return _cut(probs, num_prefix_tokens, q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, _maps_only = _gradients(ctx, grad)
        return tuple(gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, _, ctx.scale, _, ctx.maps_only = inputs
    ctx.save_for_backward(q, k, output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.maps_only:
        raise RuntimeError(f"{_NAME}: maps_only=True keeps nothing for gradients; record the call with gradients on")
    q, k, probs = ctx.saved_tensors
    return (*_backward(grad.to(probs.dtype), q, k, probs, ctx.scale), None, None, None, None)


torch.library.register_autograd("fastib::cls_attention", _gradients, setup_context=_save, lib=_backend.LIBRARY)
