"""Attention in Triton, tile by tile, forward and backward, and the rows that tiles are made of.

A tile's functions work on what is on chip: which rows those are, what is added to their scores and where results go is
the kernels' business. Rows and columns of the dropout mask are in the order of the keys.
"""

import triton
import triton.language as tl

from .philox import keep_bits

LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("ieee")  # of float32 products
ATTN_STREAM = tl.constexpr(0)  # element ((b H + h) N + i) N + j


@triton.jit
def row_pointers(ptr, start, ROWS: tl.constexpr, stride, BLOCK_D: tl.constexpr):
    """Pointers to rows start ... start + ROWS - 1 as (ROWS, BLOCK_D).

    The tile's base is a 64-bit scalar, so that the offsets in it need 32 bits.
    """
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    return ptr + (tl.zeros((), tl.int64) + start) * stride + (rows * stride + dims)


@triton.jit
def load_rows(ptr, start, ROWS: tl.constexpr, stride, N, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """Rows start ... start + ROWS - 1 of (N, D) as (ROWS, BLOCK_D); zeros outside. FULL: all rows are inside."""
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    ptrs = row_pointers(ptr, start, ROWS, stride, BLOCK_D)
    if FULL and BLOCK_D == D:
        return tl.load(ptrs)
    elif FULL:
        return tl.load(ptrs, mask=dims < D, other=0.0)
    else:
        return tl.load(ptrs, mask=(rows < N - start) & (dims < D), other=0.0)


@triton.jit
def store_rows(ptr, start, ROWS: tl.constexpr, stride, value, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    ptrs = row_pointers(ptr, start, ROWS, stride, BLOCK_D)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=(rows < N - start) & (dims < D))


@triton.jit
def joined_pointers(
    ptr, start, ROWS: tl.constexpr, stride, other_ptr, other_row, other_stride, other, BLOCK_D: tl.constexpr
):
    """row_pointers, or, where `other`, pointers to rows `other_row` of another tensor. other, other_row: (ROWS,)."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    far = other_ptr + (other_row[:, None] * other_stride + dims)
    # chosen element by element: of a chosen row the compiler does not know that 16 bytes can be read at once
    return tl.where(other[:, None], far, row_pointers(ptr, start, ROWS, stride, BLOCK_D))


@triton.jit
def load_at(ptrs, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What (ROWS, BLOCK_D) pointers point to; zeros in rows that are not `inside`, (ROWS,), and from column D on."""
    return tl.load(ptrs, mask=inside[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D), other=0.0)


@triton.jit
def store_at(ptrs, value, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=inside[:, None] & (dims < D))


@triton.jit
def bit(bits, lane):
    return ((bits >> lane) & 1) != 0


@triton.jit
def attn_bits(drop, i, start, WIDTH: tl.constexpr):
    """Attention dropout's keep bits of rows i, columns start ... start + WIDTH - 1. i: (R,).

    drop: the pair (batch, head), the number of tokens, the seed, the threshold and the factor.
    """
    bh, N, seed_ptr, threshold, _ = drop
    bits = keep_bits(tl.load(seed_ptr), ATTN_STREAM, (bh * N + i) * N + start, threshold, WIDTH)
    return bits.to(tl.int32) if WIDTH <= 32 else bits


@triton.jit
def score_tile(left, right, bias, scale_log2):
    """Scores in units of log 2: left (L, D) times right (R, D), and `bias` (L, R) or None.

    Rounded as one fused multiply-add, in every kernel: by a compiler's own choice a large score of the backward is
    another one than that of the forward, or than its row's largest one, and its exponential infinite.
    """
    return tl.fma(tl.dot(left, tl.trans(right), input_precision=PRECISION), scale_log2, 0.0 if bias is None else bias)


@triton.jit
def fwd_tile(
    state, qkv, bias, i, start, N, scale_log2, drop, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr
):
    """One step of the online softmax: queries i against keys start ... start + WIDTH - 1, of which N exist.

    state: accumulator (BLOCK_M, BLOCK_D), maximum and denominator (BLOCK_M,). k, v: (WIDTH, BLOCK_D). bias: added to
    the scores, in units of log 2, (BLOCK_M, WIDTH); or None.
    """
    acc, m, norm = state
    q, k, v = qkv
    _, _, _, _, factor = drop
    lane = tl.arange(0, WIDTH)
    s = score_tile(q, k, bias, scale_log2)
    if not FULL:
        s = tl.where((start + lane)[None, :] < N, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    norm = norm * rescale + tl.sum(p, 1)
    if ATTN:
        bits = attn_bits(drop, i, start, WIDTH)
        p = tl.where(bit(bits[:, None], lane[None, :]), p * factor, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m_new, norm


@triton.jit
def bwd_kv_tile(grads, kv, queries, bias, i, start_n, scale_log2, drop, ATTN: tl.constexpr, KEYS: tl.constexpr):
    """Adds queries i to dk and dv of keys start_n ... start_n + KEYS - 1: (KEYS, BLOCK_D). Tiles are transposed.

    queries: q and grad_out, (WIDTH, BLOCK_D); out . grad_out, the largest score, infinite where there is no query, and
    one over the sum of exponentials from there, (WIDTH,). bias: (KEYS, WIDTH) or None.
    """
    dk, dv = grads
    k, v = kv
    q, do, delta, top, per_sum = queries
    _, _, _, _, factor = drop
    s = score_tile(k, q, bias, scale_log2)
    p = tl.exp2(s - top[None, :]) * per_sum[None, :]
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p_kept = p
    if ATTN:
        keep = bit(attn_bits(drop, i, start_n, KEYS)[None, :], tl.arange(0, KEYS)[:, None])
        p_kept = tl.where(keep, p * factor, 0.0)
        dp = tl.where(keep, dp * factor, 0.0)
    dv = tl.dot(p_kept.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def bwd_q_tile(
    dq, queries, kv, bias, i, start, N, scale_log2, drop, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr
):
    """dq with keys start ... start + WIDTH - 1 added, and the gradient of their scores, (BLOCK_M, WIDTH).

    Both are larger by the softmax's sum: p is not divided by it. queries: as in bwd_kv_tile, without the last.
    """
    q, do, delta, top = queries
    k, v = kv
    _, _, _, _, factor = drop
    lane = tl.arange(0, WIDTH)
    s = score_tile(q, k, bias, scale_log2)
    p = tl.exp2(s - top[:, None])
    if not FULL:
        p = tl.where((start + lane)[None, :] < N, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if ATTN:
        bits = attn_bits(drop, i, start, WIDTH)
        dp = tl.where(bit(bits[:, None], lane[None, :]), dp * factor, 0.0)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, ds
