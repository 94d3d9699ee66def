"""Multi-head convolutional attention on a GPU (DearKD, Sec. 3.1), forward and backward.

    s_ij = scale q_i . k_j - keep_ij alpha (|d|^2 - 2 center . d),  d = pos(j) - pos(i),  out = softmax_j(s) v

A program owns BLOCK_M tokens of one (batch, head) and walks along the others in tiles of BLOCK_N. The last tile is as
narrow as 16, so that 197 tokens cost 3 * 64 + 16. Exponents are in base 2. The position term comes from the token indices.
The position term's dropout mask, which the batch shares, is made once per call, one bit an element. The backward writes
three partial sums per program for alpha and center and adds them in a fixed order: no atomics.

Floor per (batch, head), 16-bit: 8 N D bytes and 4 N^2 D FLOP forward, 16 N D bytes and 10 N^2 D FLOP backward.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .mhca_attention_config import backward_tile, block_dim, forward_tile, tail
from .philox import keep_bits

LOG2E = tl.constexpr(1.4426950408889634)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a float32 to an integer
ATTN_STREAM = tl.constexpr(0)
RPE_STREAM = tl.constexpr(1)
MAX_TOKENS, MAX_DIM = 1 << 20, 256
SCALARS = ["H", "N", "grid_w", "rpe_threshold", "attn_threshold", "S"]  # never specialised on their value


@triton.jit
def _load_rows(ptr, rows, stride, N, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """(rows, BLOCK_D) out of (N, D); zeros outside. FULL: no row is outside."""
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if FULL and BLOCK_D == D:
        return tl.load(ptrs)
    elif FULL:
        return tl.load(ptrs, mask=dims[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs, mask=(rows[:, None] < N) & (dims[None, :] < D), other=0.0)


@triton.jit
def _store_rows(ptr, rows, stride, value, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=(rows[:, None] < N) & (dims[None, :] < D))


@triton.jit
def _grid_position(tokens, grid_w, P: tl.constexpr):
    """Row and column of tokens as float32; of no meaning for prefix tokens.

    g // width is (g + 1/2) / width - 1/2 rounded to the nearest, exact below 2^20 tokens.
    """
    width = grid_w.to(tl.float32)
    g = (tokens - P).to(tl.float32)
    y = (g * (1.0 / width) + (0.5 / width - 0.5)) + ROUND - ROUND
    return y, g - y * width


@triton.jit
def _head_position(alpha_ptr, center_ptr, h, rpe_factor):
    """(-alpha log2(e) / (1 - p), center row, center column, |center|^2) of head h."""
    alpha = tl.load(alpha_ptr + h)
    c_y = tl.load(center_ptr + 2 * h)
    c_x = tl.load(center_ptr + 2 * h + 1)
    return -alpha * rpe_factor * LOG2E, c_y, c_x, c_y * c_y + c_x * c_x


@triton.jit
def _bit(bits, lane):
    return ((bits >> lane.to(tl.int64)) & 1) != 0


@triton.jit
def _rpe_bits(rpe_ptr, h, i, start, N):
    """Mask bits of rows i in the tile of columns from `start`, which does not cross a 64-bit word. i: (R,)."""
    words = (N + 63) // 64
    return tl.load(rpe_ptr + (h * N + i) * words + start // 64, mask=i < N, other=0) >> (start % 64)


@triton.jit
def _attn_bits(seed_ptr, bh, i, start, N, threshold, WIDTH: tl.constexpr):
    """Attention dropout's keep bits of rows i, columns start ... start + WIDTH - 1. i: (R,)."""
    first = (bh * N + i) * N + start
    return keep_bits(tl.load(seed_ptr), ATTN_STREAM, first, threshold, WIDTH)


@triton.jit
def _position_exponent(i, j, y_i, x_i, y_j, x_j, rpe_keep, head, P: tl.constexpr, RPE: tl.constexpr):
    """The position term, in base 2, its support, and what its gradient needs: (u, w, r) with u, w = d - center and
    r = |d|^2 - 2 center . d = u^2 + w^2 - |center|^2. y_i, x_i: already moved by the center. All broadcast to a tile.
    """
    slope, _, _, center_sq = head
    u = y_j - y_i
    w = x_j - x_i
    r = u * u + (w * w - center_sq)
    if RPE:  # the mask's bits are 0 on prefix tokens
        inside = rpe_keep
    else:
        inside = (i >= P) & (j >= P)
    return tl.where(inside, slope * r, 0.0), inside, u, w, r


@triton.jit
def _rpe_mask_kernel(rpe_ptr, seed_ptr, N, S, rpe_threshold, P: tl.constexpr, BLOCK: tl.constexpr):
    """Keep bits of the position term, (H, N, ceil(N / 64)) int64; 0 on prefix tokens. S: H * N."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.program_id(1)
    bits = keep_bits(tl.load(seed_ptr), RPE_STREAM, rows * N + word * 64, rpe_threshold, 64)
    if P > 0:
        prefix = tl.minimum(tl.maximum(P - word * 64, 0), 64)
        grid_columns = tl.where(prefix >= 64, 0, tl.full((), -1, tl.int64) << tl.minimum(prefix, 63).to(tl.int64))
        bits = tl.where(rows % N >= P, bits & grid_columns, 0)
    tl.store(rpe_ptr + rows * tl.num_programs(1) + word, bits, mask=rows < S)


@triton.jit
def _fwd_tile(acc, m, l, q, k_ptr, v_ptr, stride_kn, stride_vn, rpe_ptr, seed_ptr, bh, h, i, y_i, x_i, head, start, N,
              grid_w, scale_log2, attn_threshold, attn_factor, D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr,
              RPE: tl.constexpr, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: keys start ... start + WIDTH - 1. acc: (BLOCK_M, BLOCK_D). m, l: (BLOCK_M,)."""
    lane = tl.arange(0, WIDTH)
    j = start + lane
    k = _load_rows(k_ptr, j, stride_kn, N, D, BLOCK_D, FULL)
    v = _load_rows(v_ptr, j, stride_vn, N, D, BLOCK_D, FULL)
    y_j, x_j = _grid_position(j, grid_w, P)
    rpe_keep = None
    if RPE:
        rpe_keep = _bit(_rpe_bits(rpe_ptr, h, i, start, N)[:, None], lane[None, :])
    bias, _, _, _, _ = _position_exponent(
        i[:, None], j[None, :], y_i[:, None], x_i[:, None], y_j[None, :], x_j[None, :], rpe_keep, head, P, RPE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias
    if not FULL:
        s = tl.where(j[None, :] < N, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    l = l * rescale + tl.sum(p, 1)
    if ATTN:
        bits = _attn_bits(seed_ptr, bh, i, start, N, attn_threshold, WIDTH)
        p = tl.where(_bit(bits[:, None], lane[None, :]), p * attn_factor, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit(do_not_specialize=SCALARS)
def mhca_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, center_ptr, seed_ptr, rpe_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, grid_w, scale, rpe_factor, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M queries of one (batch, head)."""
    blocks = tl.cdiv(N, BLOCK_M)
    bh = tl.program_id(0).to(tl.int64) // blocks
    start_m = (tl.program_id(0) % blocks) * BLOCK_M
    b = bh // H
    h = bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh

    head = _head_position(alpha_ptr, center_ptr, h, rpe_factor)
    scale_log2 = scale * LOG2E
    i = start_m + tl.arange(0, BLOCK_M)
    y_i, x_i = _grid_position(i, grid_w, P)
    y_i += head[1]
    x_i += head[2]
    q = _load_rows(q_ptr, i, stride_qn, N, D, BLOCK_D, False)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    full = N // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc, m, l = _fwd_tile(
            acc, m, l, q, k_ptr, v_ptr, stride_kn, stride_vn, rpe_ptr, seed_ptr, bh, h, i, y_i, x_i, head, start, N,
            grid_w, scale_log2, attn_threshold, attn_factor, D, BLOCK_D, P, RPE, ATTN, BLOCK_N, True, PRECISION)
    if TAIL > 0:
        acc, m, l = _fwd_tile(
            acc, m, l, q, k_ptr, v_ptr, stride_kn, stride_vn, rpe_ptr, seed_ptr, bh, h, i, y_i, x_i, head, full, N,
            grid_w, scale_log2, attn_threshold, attn_factor, D, BLOCK_D, P, RPE, ATTN, TAIL, False, PRECISION)
    _store_rows(out_ptr + (b * N * H + h) * D, i, H * D, acc / l[:, None], N, D, BLOCK_D)
    tl.store(lse_ptr + bh * N + i, (m + tl.log2(l)) / LOG2E, mask=i < N)


@triton.jit
def _bwd_kv_tile(dk, dv, k, v, q_ptr, do_ptr, o_ptr, lse_ptr, stride_qn, stride_don, stride_on, rpe_ptr, seed_ptr, bh,
                 h, j, y_j, x_j, head, start, start_n, N, grid_w, scale_log2, attn_threshold, attn_factor,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr,
                 BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """Adds queries start ... start + WIDTH - 1 to dk, dv: (BLOCK_N, BLOCK_D). Tiles are transposed: (keys, queries)."""
    i = start + tl.arange(0, WIDTH)
    q = _load_rows(q_ptr, i, stride_qn, N, D, BLOCK_D, FULL)
    do = _load_rows(do_ptr, i, stride_don, N, D, BLOCK_D, FULL)
    o = _load_rows(o_ptr, i, stride_on, N, D, BLOCK_D, FULL)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + i, mask=i < N, other=float("inf")) * LOG2E
    y_i, x_i = _grid_position(i, grid_w, P)
    lane = (j - start_n)[:, None]
    rpe_keep = None
    if RPE:
        rpe_keep = _bit(_rpe_bits(rpe_ptr, h, i, start_n, N)[None, :], lane)
    bias, _, _, _, _ = _position_exponent(
        i[None, :], j[:, None], (y_i + head[1])[None, :], (x_i + head[2])[None, :], y_j[:, None], x_j[:, None], rpe_keep,
        head, P, RPE)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 + bias - lse[None, :])
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p_kept = p
    if ATTN:
        bits = _attn_bits(seed_ptr, bh, i, start_n, N, attn_threshold, BLOCK_N)
        keep = _bit(bits[None, :], lane)
        p_kept = tl.where(keep, p * attn_factor, 0.0)
        dp = tl.where(keep, dp * attn_factor, 0.0)
    dv = tl.dot(p_kept.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _bwd_q_tile(dq, sum_r, sum_u, sum_w, sum_1, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, rpe_ptr, seed_ptr,
                bh, h, i, y_i, x_i, head, start, N, grid_w, scale_log2, attn_threshold, attn_factor,
                D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr,
                WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """Adds keys start ... start + WIDTH - 1 to dq and to the rows' sums of ds, ds u, ds w, ds r for alpha and center."""
    lane = tl.arange(0, WIDTH)
    j = start + lane
    k = _load_rows(k_ptr, j, stride_kn, N, D, BLOCK_D, FULL)
    v = _load_rows(v_ptr, j, stride_vn, N, D, BLOCK_D, FULL)
    y_j, x_j = _grid_position(j, grid_w, P)
    rpe_keep = None
    if RPE:
        rpe_keep = _bit(_rpe_bits(rpe_ptr, h, i, start, N)[:, None], lane[None, :])
    bias, inside, u, w, r = _position_exponent(
        i[:, None], j[None, :], y_i[:, None], x_i[:, None], y_j[None, :], x_j[None, :], rpe_keep, head, P, RPE)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if ATTN:
        bits = _attn_bits(seed_ptr, bh, i, start, N, attn_threshold, WIDTH)
        dp = tl.where(_bit(bits[:, None], lane[None, :]), dp * attn_factor, 0.0)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if not FULL:
        inside = inside & (j[None, :] < N)
    ds = tl.where(inside, ds, 0.0)
    return dq, sum_r + tl.sum(ds * r, 1), sum_u + tl.sum(ds * u, 1), sum_w + tl.sum(ds * w, 1), sum_1 + tl.sum(ds, 1)


@triton.jit(do_not_specialize=SCALARS)
def mhca_attention_bwd_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, alpha_ptr, center_ptr, o_ptr, lse_ptr, seed_ptr, rpe_ptr, dq_ptr, dk_ptr, dv_ptr, part_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    H, N, grid_w, S, scale, rpe_factor, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M keys of one (batch, head), then its BLOCK_M queries. S: programs per head, the length of part's rows."""
    blocks = tl.cdiv(N, BLOCK_M)
    bh = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    start_m = block * BLOCK_M
    b = bh // H
    h = bh % H
    do_ptr += b * stride_dob + h * stride_doh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    lse_ptr += bh * N
    grad_offset = (b * N * H + h) * D

    head = _head_position(alpha_ptr, center_ptr, h, rpe_factor)
    scale_log2 = scale * LOG2E
    own = start_m + tl.arange(0, BLOCK_M)
    y, x = _grid_position(own, grid_w, P)
    full = N // BLOCK_N * BLOCK_N

    k = _load_rows(k_ptr, own, stride_kn, N, D, BLOCK_D, False)
    v = _load_rows(v_ptr, own, stride_vn, N, D, BLOCK_D, False)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, full, BLOCK_N):
        dk, dv = _bwd_kv_tile(
            dk, dv, k, v, q_ptr, do_ptr, o_ptr, lse_ptr, stride_qn, stride_don, stride_on, rpe_ptr, seed_ptr, bh, h, own, y, x,
            head, start, start_m, N, grid_w, scale_log2, attn_threshold, attn_factor, D, BLOCK_D, P, RPE, ATTN, BLOCK_M,
            BLOCK_N, True, PRECISION)
    if TAIL > 0:
        dk, dv = _bwd_kv_tile(
            dk, dv, k, v, q_ptr, do_ptr, o_ptr, lse_ptr, stride_qn, stride_don, stride_on, rpe_ptr, seed_ptr, bh, h, own, y, x,
            head, full, start_m, N, grid_w, scale_log2, attn_threshold, attn_factor, D, BLOCK_D, P, RPE, ATTN, BLOCK_M,
            TAIL, False, PRECISION)
    _store_rows(dk_ptr + grad_offset, own, H * D, dk * scale, N, D, BLOCK_D)
    _store_rows(dv_ptr + grad_offset, own, H * D, dv, N, D, BLOCK_D)

    q = _load_rows(q_ptr, own, stride_qn, N, D, BLOCK_D, False)
    do = _load_rows(do_ptr, own, stride_don, N, D, BLOCK_D, False)
    o = _load_rows(o_ptr, own, stride_on, N, D, BLOCK_D, False)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + own, mask=own < N, other=float("inf")) * LOG2E
    y += head[1]
    x += head[2]
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sum_r = tl.zeros((BLOCK_M,), tl.float32)
    sum_u = tl.zeros((BLOCK_M,), tl.float32)
    sum_w = tl.zeros((BLOCK_M,), tl.float32)
    sum_1 = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, full, BLOCK_N):
        dq, sum_r, sum_u, sum_w, sum_1 = _bwd_q_tile(
            dq, sum_r, sum_u, sum_w, sum_1, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, rpe_ptr, seed_ptr, bh, h,
            own, y, x, head, start, N, grid_w, scale_log2, attn_threshold, attn_factor, D, BLOCK_D, P, RPE, ATTN,
            BLOCK_N, True, PRECISION)
    if TAIL > 0:
        dq, sum_r, sum_u, sum_w, sum_1 = _bwd_q_tile(
            dq, sum_r, sum_u, sum_w, sum_1, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, rpe_ptr, seed_ptr, bh, h,
            own, y, x, head, full, N, grid_w, scale_log2, attn_threshold, attn_factor, D, BLOCK_D, P, RPE, ATTN,
            TAIL, False, PRECISION)
    _store_rows(dq_ptr + grad_offset, own, H * D, dq * scale, N, D, BLOCK_D)

    row = part_ptr + h * 3 * S + b * blocks + block
    total = tl.sum(sum_1, 0)
    tl.store(row, tl.sum(sum_r, 0))
    tl.store(row + S, tl.sum(sum_u, 0) + head[1] * total)
    tl.store(row + 2 * S, tl.sum(sum_w, 0) + head[2] * total)


@triton.jit(do_not_specialize=SCALARS)
def _bwd_reduce_kernel(part_ptr, alpha_ptr, dalpha_ptr, dcenter_ptr, S, rpe_factor, BLOCK: tl.constexpr):
    """part: (H, 3, S) float32 -> dalpha: (H,), dcenter: (H, 2), in a fixed order. Program: a head."""
    h = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sum_r = tl.zeros((BLOCK,), tl.float32)
    sum_y = tl.zeros((BLOCK,), tl.float32)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, S, BLOCK):
        ptrs = part_ptr + h * 3 * S + start + lane
        inside = start + lane < S
        sum_r += tl.load(ptrs, mask=inside, other=0.0)
        sum_y += tl.load(ptrs + S, mask=inside, other=0.0)
        sum_x += tl.load(ptrs + 2 * S, mask=inside, other=0.0)
    toward = 2.0 * tl.load(alpha_ptr + h) * rpe_factor
    tl.store(dalpha_ptr + h, -rpe_factor * tl.sum(sum_r, 0))
    tl.store(dcenter_ptr + 2 * h, toward * tl.sum(sum_y, 0))
    tl.store(dcenter_ptr + 2 * h + 1, toward * tl.sum(sum_x, 0))


def _dropout(p):
    """Threshold (a uint32's bits as int32) and factor of dropout with probability p."""
    threshold = min(int(p * 4294967296.0), 0xFFFFFFFF)
    return threshold - (threshold >> 31 << 32), 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _dense_rows(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _device_guard(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _check(q):
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"mhca_attention: the Triton kernels take float32, bfloat16 or float16, got {q.dtype}")
    if q.shape[2] > MAX_TOKENS or q.shape[3] > MAX_DIM:
        raise RuntimeError(
            f"mhca_attention: the Triton kernels take N <= {MAX_TOKENS} and D <= {MAX_DIM}, got {tuple(q.shape)}"
        )


def _rpe_mask(seed, H, N, num_prefix_tokens, threshold):
    """The kept entries of the (H, N, N) position term, one bit each: (H, N, ceil(N / 64)) int64."""
    words = (N + 63) // 64
    mask = torch.empty((H, N, words), dtype=torch.int64, device=seed.device)
    grid = (triton.cdiv(H * N, 64), words)
    _rpe_mask_kernel[grid](mask, seed, N, H * N, threshold, P=num_prefix_tokens, BLOCK=64, num_warps=4)
    return mask


def mhca_attention_fwd(
    q, k, v, alpha, center, seed, grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout
):
    """out (B, H, N, D), laid out as (B, N, H, D), and lse (B, H, N) float32. Arguments: the native op's.

    q, k, v: (B, H, N, D), any strides. alpha: (H,), center: (H, 2), float32. seed: one int64, read where a p > 0.
    RuntimeError for a dtype or a size that the kernels do not take.
    """
    _check(q)
    B, H, N, D = q.shape
    out = q.new_empty((B, N, H, D)).transpose(1, 2)
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.zero_()
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    dim = block_dim(D)
    tile = forward_tile(q.element_size(), dim)
    rpe_threshold, rpe_factor = _dropout(rpe_dropout)
    attn_threshold, attn_factor = _dropout(attn_dropout)
    with _device_guard(q):
        rpe = _rpe_mask(seed, H, N, num_prefix_tokens, rpe_threshold) if rpe_dropout > 0 else None
        mhca_attention_fwd_kernel[(triton.cdiv(N, tile.block_m) * B * H,)](
            q, k, v, alpha.contiguous(), center.contiguous(), seed if attn_dropout > 0 else None, rpe, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            H, N, grid_w, float(scale), rpe_factor, attn_threshold, attn_factor,
            D, dim, num_prefix_tokens, rpe is not None, attn_dropout > 0,
            tile.block_m, tile.block_n, tail(N, tile.block_n), "ieee",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def mhca_attention_bwd(
    grad_out, q, k, v, alpha, center, out, lse, seed, grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout
):
    """Gradients to q, k, v (laid out as `out`), alpha and center (float32). Arguments: the native op's.

    grad_out: (B, H, N, D), any strides. out, lse: what the forward gave. Errors as there.
    """
    _check(q)
    B, H, N, D = q.shape
    dq, dk, dv = (q.new_empty((B, N, H, D)).transpose(1, 2) for _ in range(3))
    dalpha, dcenter = torch.empty_like(alpha), torch.empty_like(center)
    if q.numel() == 0:
        return dq, dk, dv, dalpha.zero_(), dcenter.zero_()
    do, q, k, v, out = (_dense_rows(x) for x in (grad_out, q, k, v, out))
    alpha, lse = alpha.contiguous(), lse.contiguous()
    dim = block_dim(D)
    tile = backward_tile(q.element_size(), dim)
    rpe_threshold, rpe_factor = _dropout(rpe_dropout)
    attn_threshold, attn_factor = _dropout(attn_dropout)
    blocks = triton.cdiv(N, tile.block_m)
    with _device_guard(q):
        rpe = _rpe_mask(seed, H, N, num_prefix_tokens, rpe_threshold) if rpe_dropout > 0 else None
        partials = alpha.new_empty((H, 3, B * blocks))
        mhca_attention_bwd_kernel[(blocks * B * H,)](
            do, q, k, v, alpha, center.contiguous(), out, lse, seed if attn_dropout > 0 else None, rpe,
            dq, dk, dv, partials,
            *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            H, N, grid_w, B * blocks, float(scale), rpe_factor, attn_threshold, attn_factor,
            D, dim, num_prefix_tokens, rpe is not None, attn_dropout > 0,
            tile.block_m, tile.block_n, tail(N, tile.block_n), "ieee",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _bwd_reduce_kernel[(H,)](partials, alpha, dalpha, dcenter, B * blocks, rpe_factor, BLOCK=512, num_warps=4)
    return dq, dk, dv, dalpha, dcenter
