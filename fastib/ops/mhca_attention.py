"""Multi-head convolutional attention (DearKD, Sec. 3.1): the public function, its autograd and its registration."""

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
    grid,
    integer,
    invalid,
    seed_tensor,
)
from fastib.ops._backend import Op, below_autograd
from fastib.reference.mhca_attention import mhca_attention_ref

_NAME = "mhca_attention"
_OPTIONS = "int grid_h, int grid_w, int num_prefix_tokens, float scale, float rpe_dropout, float attn_dropout"
SCHEMAS = {
    "mhca_attention": (
        f"(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center, Tensor? seed, {_OPTIONS})"
        " -> (Tensor out, Tensor stats)"
    ),
    "mhca_attention_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center, Tensor out, Tensor stats,"
        f" Tensor? seed, {_OPTIONS})"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_alpha, Tensor grad_center)"
    ),
}


def mhca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    center: Tensor,
    grid_size: int | tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    rpe_dropout: float = 0.0,
    attn_dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of tokens on a grid, with a learned quadratic position term in its scores (DearKD, Eq. 2-3).

    `s_ij = scale q_i.k_j + keep_hij / (1 - rpe_dropout) b_hij`, `b_hij = -alpha_h (|d|^2 - 2 center_h.d)`,
    `d = pos(j) - pos(i)`, and b is 0 where i or j is a prefix token; softmax over j, attention dropout, times v.

    q, k, v: (B, H, N, D), N = num_prefix_tokens + grid_h * grid_w, the prefix tokens first, then the patches row-major.
        float32, bfloat16, float16 or float64, any strides; under autocast they are cast to its dtype.
    alpha: (H,), 1 / patch^2. center: (H, 2), (row, column) in patches. Any floating dtype; computed in float32 (float64
        where q is). A large alpha attends only to the patch nearest to `center`, alpha = 0 is plain attention.
    grid_size: patches per (column, row), (grid_h, grid_w), or one int for a square grid.
    scale: factor of the dot products; D^-1/2 where None.
    rpe_dropout: probability to drop an element of the (H, N, N) position term; the batch shares the mask.
    attn_dropout: probability to drop an element of the attention matrix, as in `F.scaled_dot_product_attention`.
    seed: of both masks; an int or a one-element int64 tensor on q's device. Drawn from torch's generator where None.
        The same seed gives the same masks on every backend.
    backend: None chooses; "reference", "cpu" or "triton" insist.

    Returns (B, H, N, D) in q's dtype, stored as a dense (B, N, H, D): `out.transpose(1, 2).reshape(B, N, H * D)` is a
    view. Differentiable once, in q, k, v, alpha and center; "reference" any number of times.

    Raises ValueError for a wrong shape, dtype or range, RuntimeError for a device or backend that does not fit.
    """
    check_tensors(_NAME, q=q, k=k, v=v, alpha=alpha, center=center)
    q, k, v = autocast(q, k, v)
    grid_h, grid_w = grid(_NAME, grid_size)
    num_prefix_tokens = integer(_NAME, "num_prefix_tokens", num_prefix_tokens)
    _check_tensors(q, k, v, alpha, center, grid_h, grid_w, num_prefix_tokens)
    check_probability(_NAME, "rpe_dropout", rpe_dropout)
    check_probability(_NAME, "attn_dropout", attn_dropout)
    if scale is None:
        scale = default_scale(q.shape[3])
    else:
        check_finite(_NAME, "scale", scale)
    if seed is not None or rpe_dropout > 0 or attn_dropout > 0:
        seed = seed_tensor(_NAME, seed, q.device)

    if _OP.choose(backend, q) == "reference":
        return mhca_attention_ref(
            q, k, v, alpha, center, (grid_h, grid_w),
            num_prefix_tokens=num_prefix_tokens, scale=scale,
            rpe_dropout=rpe_dropout, attn_dropout=attn_dropout, seed=seed,
        )  # fmt: skip
    position_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if alpha.dtype != position_dtype:
        alpha = alpha.to(position_dtype)
    if center.dtype != position_dtype:
        center = center.to(position_dtype)
    args = (q, k, v, alpha, center, seed, grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout)
    if _backend.is_recorded():
        return _forward(*args)[0]
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or alpha.requires_grad or center.requires_grad
    ):
        return _MHCAAttention.apply(*args)
    with below_autograd():
        return _forward(*args)[0]


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, center: Tensor, grid_h: int, grid_w: int, num_prefix_tokens: int
) -> None:
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 4:
        raise invalid(_NAME, "q", "of shape (B, H, N, D)", tuple(shape))
    if k.shape != shape or v.shape != shape or alpha.shape != shape[1:2] or center.shape != (shape[1], 2):
        expected = {"k": (k, shape), "v": (v, shape), "alpha": (alpha, shape[1:2]), "center": (center, (shape[1], 2))}
        for name, (tensor, size) in expected.items():
            if tensor.shape != size:
                raise invalid(_NAME, name, f"of shape {tuple(size)}, as q is {tuple(shape)}", tuple(tensor.shape))
    check_dtype(_NAME, "q", q)
    if k.dtype != dtype:
        raise invalid(_NAME, "k", f"{dtype} like q", k.dtype)
    if v.dtype != dtype:
        raise invalid(_NAME, "v", f"{dtype} like q", v.dtype)
    if not alpha.is_floating_point():
        raise invalid(_NAME, "alpha", "floating point", alpha.dtype)
    if not center.is_floating_point():
        raise invalid(_NAME, "center", "floating point", center.dtype)
    if k.device != device or v.device != device or alpha.device != device or center.device != device:
        for name, tensor in {"k": k, "v": v, "alpha": alpha, "center": center}.items():
            check_device(_NAME, name, tensor, device)
    if shape[2] != num_prefix_tokens + grid_h * grid_w:
        tokens = f"of {num_prefix_tokens + grid_h * grid_w} tokens (num_prefix_tokens={num_prefix_tokens} + grid_size "
        raise invalid(_NAME, "q", tokens + f"{grid_h} x {grid_w})", f"N={shape[2]}")


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    return _empty_out(q), alpha.new_empty((batch, heads, 2, tokens))


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, center: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_out(q), _empty_out(q), _empty_out(q), alpha.new_empty(alpha.shape), center.new_empty(center.shape)


def _empty_out(q: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


_forward = _backend.register(_NAME, SCHEMAS[_NAME], _forward_fake, "mhca_attention.mhca_attention_fwd")
_backward = _backend.register_backward(
    _NAME,
    "mhca_attention_backward",
    SCHEMAS["mhca_attention_backward"],
    _backward_fake,
    "mhca_attention.mhca_attention_bwd",
)
_OP = Op(_NAME, gpu="triton", gpu_limits=limits.attention)


class _MHCAAttention(torch.autograd.Function):
    """The eager path: a third of the host time of the dispatcher's own autograd, which serves compile and export."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with below_autograd():
            out, stats = _forward(*args)
        _save(ctx, args, (out, stats))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, alpha, center, seed, *options = inputs
    out, stats = output
    ctx.save_for_backward(q, k, v, alpha, center, out, stats, seed)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _save_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    return (*_backward(grad_out, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


torch.library.register_autograd(f"fastib::{_NAME}", _gradients, setup_context=_save_registered, lib=_backend.LIBRARY)
