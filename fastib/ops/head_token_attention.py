"""Attention with extra tokens (DHVT, Sec. 3.3): the public function."""

from __future__ import annotations

from torch import Tensor

from fastib.ops import _backend
from fastib.ops._backend import autocast, check_device, check_finite, check_probability, invalid, seed_tensor
from fastib.reference.head_token_attention import head_token_attention_ref

_NAME = "head_token_attention"


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
    backend: None chooses; "reference" insists.

    Returns (B, H, N, D) in q's dtype. Raises ValueError for shapes, dtypes and numbers that do not fit, RuntimeError
    for devices that differ and a backend that is not available; both name the argument.
    """
    q, k, v, q_extra, k_extra, v_extra = autocast(q, k, v, q_extra, k_extra, v_extra)
    _check_tensors(q, k, v, q_extra, k_extra, v_extra)
    check_probability(_NAME, "attn_dropout", attn_dropout)
    if scale is not None:
        check_finite(_NAME, "scale", scale)
    if seed is not None or attn_dropout > 0:
        seed = seed_tensor(_NAME, seed, q.device)
    if backend not in (None, "reference"):
        if backend not in _backend.BACKENDS:
            raise ValueError(f"{_NAME}: backend must be None or one of {_backend.BACKENDS}, got {backend!r}")
        raise RuntimeError(f"{_NAME}: backend={backend!r} is not available: it has no kernels yet. Pass backend=None.")
    return head_token_attention_ref(
        q, k, v, q_extra, k_extra, v_extra, scale=scale, attn_dropout=attn_dropout, seed=seed
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor, k_extra: Tensor, v_extra: Tensor) -> None:
    if q.dim() != 4:
        raise invalid(_NAME, "q", "of shape (B, H, N, D)", tuple(q.shape))
    if q.dtype not in _backend.DTYPES:
        raise invalid(_NAME, "q", "float32, bfloat16, float16 or float64", q.dtype)
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
