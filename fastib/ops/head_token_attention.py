"""Attention with extra tokens (DHVT, Sec. 3.3): the public function, its autograd and its registration."""

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
    check_probability,
    check_tensors,
    default_scale,
    invalid,
    seed_tensor,
)
from fastib.ops._backend import Op, below_autograd
from fastib.reference.head_token_attention import head_token_attention_ref

_NAME = "head_token_attention"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor q_extra, Tensor k_extra, Tensor v_extra"
SCHEMAS = {
    _NAME: f"({_INPUTS}, Tensor? seed, float scale, float attn_dropout) -> (Tensor out, Tensor stats)",
    f"{_NAME}_backward": (
        f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor stats, Tensor? seed, float scale, float attn_dropout)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_extra,"
        " Tensor grad_k_extra, Tensor grad_v_extra)"
    ),
}


def head_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_extra: Tensor,
    k_extra: Tensor,
    v_extra: Tensor,
    *,
    scale: float | None = None,
    attn_dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over N tokens and T extra ones, whose own outputs are averaged into row 0 (DHVT, Sec. 3.3).

    `a = softmax(scale [q; q_extra] [k; k_extra]^T)`, with dropout; `o = a [v; v_extra]`; the result is rows 0 .. N - 1
    of o, and the mean of rows N .. N + T - 1 is added to row 0. A projection of row 0 plus one more of its bias is then
    "average the projected head tokens and add them to the class token".

    q, k, v: (B, H, N, D), the class token first. q_extra, k_extra, v_extra: (B, H, T, D). All of one dtype: float32,
        bfloat16, float16 or float64, any strides; under autocast they are cast to its dtype.
    scale: factor of the dot products; D^-1/2 where None.
    attn_dropout: probability to drop an element of the (B, H, N + T, N + T) attention matrix.
    seed: of the mask; an int or a one-element int64 tensor on q's device. Drawn from torch's generator where None.
    backend: None chooses; "reference", "cpu" or "triton" insist.

    Returns (B, H, N, D) in q's dtype, stored as a dense (B, N, H, D): `out.transpose(1, 2).flatten(2)` is a view.
    Differentiable once, in all six; "reference" any number of times. Raises ValueError for shapes, dtypes and numbers
    that do not fit, RuntimeError for devices that differ and a backend that is not available; both name the argument.
    """
    check_tensors(_NAME, q=q, k=k, v=v, q_extra=q_extra, k_extra=k_extra, v_extra=v_extra)
    q, k, v, q_extra, k_extra, v_extra = inputs = autocast(q, k, v, q_extra, k_extra, v_extra)
    _check_tensors(q, k, v, q_extra, k_extra, v_extra)
    check_probability(_NAME, "attn_dropout", attn_dropout)
    if scale is None:
        scale = default_scale(q.shape[3])
    else:
        check_finite(_NAME, "scale", scale)
    if seed is not None or attn_dropout > 0:
        seed = seed_tensor(_NAME, seed, q.device)

    if _OP.choose(backend, q, q_extra) == "reference":
        return head_token_attention_ref(*inputs, scale=scale, attn_dropout=attn_dropout, seed=seed)
    args = (*inputs, seed, scale, attn_dropout)
    if _backend.is_recorded():
        return _forward(*args)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _HeadTokenAttention.apply(*args)
    with below_autograd():
        return _forward(*args)[0]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor, k_extra: Tensor, v_extra: Tensor) -> None:
    if q.dim() != 4:
        raise invalid(_NAME, "q", "of shape (B, H, N, D)", tuple(q.shape))
    check_dtype(_NAME, "q", q)
    batch, heads, _, head_dim = q.shape
    if q_extra.dim() != 4 or q_extra.shape[:2] != (batch, heads) or q_extra.shape[3] != head_dim:
        expected = f"of shape ({batch}, {heads}, T, {head_dim}), as q is {tuple(q.shape)}"
        raise invalid(_NAME, "q_extra", expected, tuple(q_extra.shape))
    others = {"k": (k, q), "v": (v, q), "q_extra": (q_extra, q_extra), "k_extra": (k_extra, q_extra),
              "v_extra": (v_extra, q_extra)}  # fmt: skip
    for name, (tensor, like) in others.items():
        if tensor.shape != like.shape:
            source = "q" if like is q else "q_extra"
            expected = f"of shape {tuple(like.shape)}, as {source} is"
            raise invalid(_NAME, name, expected, tuple(tensor.shape))
        if tensor.dtype != q.dtype:
            raise invalid(_NAME, name, f"{q.dtype} like q", tensor.dtype)
        check_device(_NAME, name, tensor, q.device)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return _empty_like(q), q.new_empty((batch, heads, 2, tokens + q_extra.shape[2]), dtype=wide)


def _backward_fake(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_like(t) for t in inputs[:6])


def _empty_like(t: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = t.shape
    return t.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


_forward = _backend.register(_NAME, SCHEMAS[_NAME], _forward_fake, "head_token_attention.head_token_attention_fwd")
_backward = _backend.register_backward(
    _NAME,
    f"{_NAME}_backward",
    SCHEMAS[f"{_NAME}_backward"],
    _backward_fake,
    "head_token_attention.head_token_attention_bwd",
)
_OP = Op(_NAME, gpu="triton", gpu_limits=limits.head_token_attention)


class _HeadTokenAttention(torch.autograd.Function):
    """The eager path; the dispatcher's own autograd serves compile and export."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with below_autograd():
            outputs = _forward(*args)
        _save(ctx, args, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, seed, scale, attn_dropout = inputs
    ctx.save_for_backward(*tensors, *outputs, seed)
    ctx.options = scale, attn_dropout
    ctx.set_materialize_grads(False)


def _save_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    return (*_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None)


torch.library.register_autograd(f"fastib::{_NAME}", _gradients, setup_context=_save_registered, lib=_backend.LIBRARY)
