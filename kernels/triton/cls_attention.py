"""Attention of the class token alone on a GPU (AAL, Eq. 3): one program per (batch, head).

Floor per (batch, head): N D elements read forward, 2 N D moved backward; the arithmetic hides behind them.
"""

import torch

import triton
import triton.language as tl
from fastib import _gpu_limits as limits

from .attention_config import block_dim, dense_rows, device_guard, empty_rows
from .attention_tile import LOG2E

SCALARS = ["H", "N", "first_key", "first"]


@triton.jit
def _scores(q, k_ptr, stride_kn, start, first_key, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scores of keys start ... start + BLOCK_N - 1 in units of log 2, -infinity on keys left out. q: (BLOCK_D,)."""
    j = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = (j >= first_key) & (j < N)
    keys = tl.load(
        k_ptr + j[:, None].to(tl.int64) * stride_kn + dims[None, :],
        mask=inside[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    return j, tl.where(inside, tl.sum(keys.to(tl.float32) * q[None, :], 1), -float("inf"))


@triton.jit(do_not_specialize=SCALARS)
def cls_attention_fwd_kernel(
    q_ptr, k_ptr, probs_ptr, stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, H, N, first_key, first, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """probs (B, H, N - first) of the keys from `first` on; 0 before first_key.

    SINGLE: one block holds all keys, else they are read twice.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    k_ptr += b * stride_kb + h * stride_kh
    probs_ptr += bh * (N - first) - first
    dims = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + dims, mask=dims < D, other=0.0).to(tl.float32) * (scale * LOG2E)
    if SINGLE:
        j, s = _scores(q, k_ptr, stride_kn, 0, first_key, N, D, BLOCK_N, BLOCK_D)
        p = tl.exp2(s - tl.max(s, 0))
        tl.store(probs_ptr + j, (p / tl.sum(p, 0)).to(probs_ptr.dtype.element_ty), mask=(j >= first) & (j < N))
    else:
        top = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # per lane, like the sum
        norm = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            j, s = _scores(q, k_ptr, stride_kn, start, first_key, N, D, BLOCK_N, BLOCK_D)
            higher = tl.maximum(top, s)
            live = higher > -float("inf")
            norm = tl.where(live, norm * tl.exp2(top - higher) + tl.exp2(s - higher), norm)
            top = higher
        peak = tl.max(top, 0)
        total = tl.sum(norm * tl.exp2(top - peak), 0)
        for start in range(0, N, BLOCK_N):
            j, s = _scores(q, k_ptr, stride_kn, start, first_key, N, D, BLOCK_N, BLOCK_D)
            p = tl.exp2(s - peak) / total
            tl.store(probs_ptr + j, p.to(probs_ptr.dtype.element_ty), mask=(j >= first) & (j < N))


@triton.jit(do_not_specialize=SCALARS)
def cls_attention_bwd_kernel(
    grad_ptr, q_ptr, k_ptr, probs_ptr, dq_ptr, dk_ptr, stride_qb, stride_qh, stride_kb, stride_kh, stride_kn,
    H, N, first, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq (B, H, D) dense, dk laid out as a dense (B, N, H, D); probs (B, H, N) and grad (B, H, N - first), of the keys
    from `first` on, dense, float32."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    k_ptr += b * stride_kb + h * stride_kh
    dk_ptr += (b * N * H + h) * D
    grad_ptr += bh * (N - first) - first
    probs_ptr += bh * N
    lane = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + dims, mask=dims < D, other=0.0).to(tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + lane
        given = (j >= first) & (j < N)
        along += tl.load(probs_ptr + j, given, 0.0) * tl.load(grad_ptr + j, given, 0.0)
    delta = tl.sum(along, 0)
    dq = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + lane
        p = tl.load(probs_ptr + j, mask=j < N, other=0.0)
        ds = p * (tl.load(grad_ptr + j, mask=(j >= first) & (j < N), other=0.0) - delta) * scale
        inside = (j < N)[:, None] & (dims < D)[None, :]
        row = j[:, None].to(tl.int64)
        keys = tl.load(k_ptr + row * stride_kn + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        dq += tl.sum(ds[:, None] * keys, 0)
        tl.store(dk_ptr + row * (H * D) + dims[None, :], (ds[:, None] * q[None, :]).to(dk_ptr.dtype.element_ty), inside)
    tl.store(dq_ptr + bh * D + dims, dq.to(dq_ptr.dtype.element_ty), mask=dims < D)


def _block_keys(tokens: int, dim: int) -> int:
    """Keys of a block: a power of two that gives a thread at most 64 elements."""
    return max(16, min(triton.next_power_of_2(tokens), 8192 // dim, 256))


def _dense_last(q: torch.Tensor) -> torch.Tensor:
    return q if q.stride(2) == 1 or q.shape[2] == 1 else q.contiguous()


def cls_attention_fwd(q, k, num_prefix_tokens, scale, over_all, maps_only):
    """maps_only: (B, H, N - num_prefix_tokens) in k's dtype; else (B, H, N) in float32. Arguments: the native op's.

    RuntimeError for a dtype or a size not taken.
    """
    limits.check("cls_attention", limits.attention(k))
    B, H, N, D = k.shape
    first = num_prefix_tokens if maps_only else 0
    probs = k.new_empty((B, H, N - first), dtype=k.dtype if maps_only else torch.float32)
    first_key = 0 if over_all else num_prefix_tokens
    if probs.numel() == 0 or first_key == N:
        return probs.zero_()
    q, k = _dense_last(q), dense_rows(k)
    dim = block_dim(D)
    block = _block_keys(N, dim)
    with device_guard(k):
        cls_attention_fwd_kernel[(B * H,)](
            q, k, probs, *q.stride()[:2], *k.stride()[:3], H, N, first_key, first, float(scale),
            D, dim, block, block >= N, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return probs


def cls_attention_bwd(grad, q, k, probs, scale):
    """Gradients to q (B, H, D) and k (B, H, N, D), laid out as (B, N, H, D). Arguments: the native op's."""
    limits.check("cls_attention", limits.attention(k))
    B, H, N, D = k.shape
    dq, dk = q.new_empty(q.shape), empty_rows(k)
    if k.numel() == 0:
        return dq.zero_(), dk
    q, k = _dense_last(q), dense_rows(k)
    dim = block_dim(D)
    with device_guard(k):
        cls_attention_bwd_kernel[(B * H,)](
            grad.contiguous(), q, k, probs.contiguous(), dq, dk, *q.stride()[:2], *k.stride()[:3], H, N,
            N - grad.shape[2], float(scale), D, dim, _block_keys(N, dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dq, dk
