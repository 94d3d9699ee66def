"""Attention with extra tokens in plain PyTorch: the definition that every kernel is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from fastib.reference.philox import draw_seed, keep_factor, keep_mask

ATTN_STREAM = 0


def head_token_attention_ref(
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
) -> Tensor:
    """softmax(scale [q; qx] [k; kx]^T) [v; vx], of which the extra rows' mean is added to row 0 (DHVT, Sec. 3.3).

    q, k, v, result: (B, H, N, D), class token first. q_extra, k_extra, v_extra: (B, H, T, D), which come last, as
    tokens N .. N + T - 1. Dropout masks the (B, H, N + T, N + T) attention matrix. seed: int or one-element int64
    tensor; drawn from torch's generator where it is None and attn_dropout is above 0. The softmax is float32, as is the
    sum in row 0 (float64 for float64 inputs). Checks nothing.
    """
    tokens, extra = q.shape[2], q_extra.shape[2]
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (torch.cat(pair, dim=2) for pair in ((q, q_extra), (k, k_extra), (v, v_extra)))
    attn = ((q * scale) @ k.transpose(-2, -1)).to(wide).softmax(dim=-1)
    if attn_dropout > 0:
        seed = draw_seed(q.device) if seed is None else seed
        keep = keep_mask(seed, tuple(attn.shape), attn_dropout, ATTN_STREAM, q.device)
        attn = torch.where(keep, attn * keep_factor(attn_dropout), 0.0)
    out, rest = (attn.to(v.dtype) @ v).split((tokens, extra), dim=2)
    if extra == 0 or tokens == 0:
        return out
    first = out[:, :, :1].to(wide) + rest.to(wide).mean(dim=2, keepdim=True)
    return torch.cat((first.to(out.dtype), out[:, :, 1:]), dim=2)
