"""Multi-head convolutional attention on a GPU (DearKD, Sec. 3.1), forward and backward.

    s_ij = scale q_i . k_j - keep_ij alpha (|d|^2 - 2 center . d),  d = pos(j) - pos(i),  out = softmax_j(s) v

A program owns BLOCK_M tokens of one (batch, head) and walks along the others in tiles of BLOCK_N, the last of them as
narrow as 16: 197 tokens cost 6 * 32 + 16. At ViT lengths a forward program owns a whole head and keeps K and V on chip.
The position term comes from the token indices; its dropout mask, which the batch shares, is made once per call, one bit
an element. Three partial sums per backward program, for alpha and center, are added in a fixed order: no atomics.

Floor per (batch, head), 16-bit: 8 N D bytes and 4 N^2 D FLOP forward, 16 N D bytes and 10 N^2 D FLOP backward.
"""

import torch

import triton
import triton.language as tl
from fastib import _gpu_limits as limits

from . import attention_config as config
from .attention_tile import LOG2E, bit, bwd_kv_tile, bwd_q_tile, fwd_tile, load_rows, store_rows
from .philox import threshold_and_factor
from .relative_position import grid_position, head_position, position_exponent, rpe_bits, rpe_mask

SCALARS = ["H", "N", "grid_w", "rpe_threshold", "attn_threshold", "S"]  # never specialised on their value


@triton.jit
def _row_term(
    rows, i, start, N, P: tl.constexpr, RPE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Position term of queries i against keys start ... start + WIDTH - 1, with u, w, r, and where it acts."""
    y_i, x_i, slope, center_sq, h, grid_w, rpe_ptr = rows
    lane = tl.arange(0, WIDTH)
    j = start + lane
    y_j, x_j = grid_position(start, WIDTH, grid_w, P)
    inside = j[None, :] >= P
    if RPE:  # the mask's bits are 0 on prefix tokens
        inside = bit(rpe_bits(rpe_ptr, h, i, start, N, WIDTH)[:, None], lane[None, :])
    bias, u, w, r = position_exponent(
        slope[:, None], y_i[:, None], x_i[:, None], y_j[None, :], x_j[None, :], center_sq, inside, RPE or MASKED
    )
    return bias, u, w, r, inside


@triton.jit
def _fwd_step(
    state, qkv, rows, i, start, N, scale_log2, drop,
    P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
    PREFIX: tl.constexpr,
):  # fmt: skip
    """fwd_tile with the position term. PREFIX: some of the keys may be prefix tokens."""
    bias, _, _, _, _ = _row_term(rows, i, start, N, P, RPE, WIDTH, PREFIX)
    return fwd_tile(state, qkv, bias, i, start, N, scale_log2, drop, ATTN, WIDTH, FULL)


@triton.jit(do_not_specialize=SCALARS)
def mhca_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, center_ptr, seed_ptr, rpe_ptr, out_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, grid_w, scale, rpe_factor, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M queries of one (batch, head); where RESIDENT > 0, all of them.

    RESIDENT: N // BLOCK_N, the number of full tiles, where all K and V stay on chip: memory is then read once.
    """
    if RESIDENT > 0:
        bh = tl.program_id(0).to(tl.int64)
        begin = 0
        end = N
    else:
        blocks = tl.cdiv(N, BLOCK_M)
        bh = tl.program_id(0).to(tl.int64) // blocks
        begin = (tl.program_id(0) % blocks) * BLOCK_M
        end = begin + BLOCK_M
    b = bh // H
    h = bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    out_ptr += (b * N * H + h) * D

    slope, center_y, center_x, center_sq = head_position(alpha_ptr, center_ptr, h, rpe_factor)
    scale_log2 = scale * LOG2E
    drop = (bh, N, seed_ptr, attn_threshold, attn_factor)
    full = N // BLOCK_N * BLOCK_N
    k_tiles = ()
    v_tiles = ()
    for t in tl.static_range(RESIDENT):
        k_tiles = k_tiles + (load_rows(k_ptr, t * BLOCK_N, BLOCK_N, stride_kn, N, D, BLOCK_D, True),)  # noqa: RUF005
        v_tiles = v_tiles + (load_rows(v_ptr, t * BLOCK_N, BLOCK_N, stride_vn, N, D, BLOCK_D, True),)  # noqa: RUF005
    if TAIL > 0:
        k_tail = load_rows(k_ptr, full, TAIL, stride_kn, N, D, BLOCK_D, False)
        v_tail = load_rows(v_ptr, full, TAIL, stride_vn, N, D, BLOCK_D, False)

    for start_m in range(begin, end, BLOCK_M):
        i = start_m + tl.arange(0, BLOCK_M)
        y_i, x_i = grid_position(start_m, BLOCK_M, grid_w, P)
        rows = (y_i + center_y, x_i + center_x, tl.where(i >= P, slope, 0.0), center_sq, h, grid_w, rpe_ptr)
        q = load_rows(q_ptr, start_m, BLOCK_M, stride_qn, N, D, BLOCK_D, False)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        m = tl.full((BLOCK_M,), -3.0e38, tl.float32)  # finite: the scores of a tile may all be -infinity
        norm = tl.zeros((BLOCK_M,), tl.float32)
        zero = start_m >> 30  # keeps the compiler from holding the positions of all keys in registers
        if RESIDENT > 0:
            for t in tl.static_range(RESIDENT):
                qkv = (q, k_tiles[t], v_tiles[t])
                start = t * BLOCK_N + zero
                acc, m, norm = _fwd_step(
                    (acc, m, norm),
                    qkv,
                    rows,
                    i,
                    start,
                    N,
                    scale_log2,
                    drop,
                    P,
                    RPE,
                    ATTN,
                    BLOCK_N,
                    True,
                    t * BLOCK_N < P,
                )
        else:
            for start in range(0, full, BLOCK_N):
                k = load_rows(k_ptr, start, BLOCK_N, stride_kn, N, D, BLOCK_D, True)
                v = load_rows(v_ptr, start, BLOCK_N, stride_vn, N, D, BLOCK_D, True)
                acc, m, norm = _fwd_step(
                    (acc, m, norm), (q, k, v), rows, i, start, N, scale_log2, drop, P, RPE, ATTN, BLOCK_N, True, P > 0
                )
        if TAIL > 0:
            qkv = (q, k_tail, v_tail)
            acc, m, norm = _fwd_step(
                (acc, m, norm), qkv, rows, i, full + zero, N, scale_log2, drop, P, RPE, ATTN, TAIL, False, P > 0
            )
        store_rows(out_ptr, start_m, BLOCK_M, H * D, acc * (1.0 / norm)[:, None], N, D, BLOCK_D)
        tl.store(stats_ptr + 2 * bh * N + i, m, mask=i < N)
        tl.store(stats_ptr + (2 * bh + 1) * N + i, norm, mask=i < N)


@triton.jit
def _bwd_kv_step(
    grads, kv, queries, keys, start, N, scale_log2, drop, D: tl.constexpr, BLOCK_D: tl.constexpr,
    P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds queries start ... start + WIDTH - 1 to dk and dv."""
    q_ptr, do_ptr, o_ptr, stats_ptr, stride_qn, stride_don, stride_on, center_y, center_x = queries
    j, start_n, y_j, x_j, slope, center_sq, h, grid_w, rpe_ptr = keys
    KEYS: tl.constexpr = j.shape[0]
    i = start + tl.arange(0, WIDTH)
    q = load_rows(q_ptr, start, WIDTH, stride_qn, N, D, BLOCK_D, FULL)
    do = load_rows(do_ptr, start, WIDTH, stride_don, N, D, BLOCK_D, FULL)
    o = load_rows(o_ptr, start, WIDTH, stride_on, N, D, BLOCK_D, FULL)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    top = tl.load(stats_ptr + i, mask=i < N, other=float("inf"))
    per_sum = 1.0 / tl.load(stats_ptr + N + i, mask=i < N, other=1.0)
    y_i, x_i = grid_position(start, WIDTH, grid_w, P)
    y_i += center_y
    x_i += center_x
    inside = i[None, :] >= P
    if RPE:
        inside = bit(rpe_bits(rpe_ptr, h, i, start_n, N, KEYS)[None, :], (j - start_n)[:, None])
    bias, _, _, _ = position_exponent(
        slope[:, None], y_i[None, :], x_i[None, :], y_j[:, None], x_j[:, None], center_sq, inside, RPE or P > 0
    )
    return bwd_kv_tile(grads, kv, (q, do, delta, top, per_sum), bias, i, start_n, scale_log2, drop, ATTN, KEYS)


@triton.jit
def _bwd_q_step(
    sums, row_tiles, rows, i, kv, start, N, scale_log2, drop, D: tl.constexpr, BLOCK_D: tl.constexpr,
    P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds keys start ... start + WIDTH - 1 to dq and, for alpha and center, to row sums of ds r, ds u, ds w and ds."""
    dq, sum_r, sum_u, sum_w, sum_1 = sums
    k_ptr, v_ptr, stride_kn, stride_vn = kv
    k = load_rows(k_ptr, start, WIDTH, stride_kn, N, D, BLOCK_D, FULL)
    v = load_rows(v_ptr, start, WIDTH, stride_vn, N, D, BLOCK_D, FULL)
    bias, u, w, r, inside = _row_term(rows, i, start, N, P, RPE, WIDTH, P > 0)
    dq, ds = bwd_q_tile(dq, row_tiles, (k, v), bias, i, start, N, scale_log2, drop, ATTN, WIDTH, FULL)
    if not FULL:
        inside = inside & ((start + tl.arange(0, WIDTH))[None, :] < N)
    if RPE or P > 0 or not FULL:
        ds = tl.where(inside, ds, 0.0)
    return dq, sum_r + tl.sum(ds * r, 1), sum_u + tl.sum(ds * u, 1), sum_w + tl.sum(ds * w, 1), sum_1 + tl.sum(ds, 1)


@triton.jit(do_not_specialize=SCALARS)
def mhca_attention_bwd_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, alpha_ptr, center_ptr, o_ptr, stats_ptr, seed_ptr, rpe_ptr,
    dq_ptr, dk_ptr, dv_ptr, part_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    H, N, grid_w, S, scale, rpe_factor, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, RPE: tl.constexpr, ATTN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Even program: dk and dv of BLOCK_M keys of one (batch, head). Odd: dq and three sums of its BLOCK_M queries.

    One launch, and each half recomputes the tiles: dq of all tokens does not fit in registers beside the rest.
    part: (H, 3, S), S = B * blocks.
    """
    blocks = tl.cdiv(N, BLOCK_M)
    pair = tl.program_id(0) // 2
    bh = pair.to(tl.int64) // blocks
    block = pair % blocks
    start_m = block * BLOCK_M
    b = bh // H
    h = bh % H
    do_ptr += b * stride_dob + h * stride_doh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    stats_ptr += 2 * bh * N
    grad_offset = (b * N * H + h) * D

    slope, center_y, center_x, center_sq = head_position(alpha_ptr, center_ptr, h, rpe_factor)
    scale_log2 = scale * LOG2E
    drop = (bh, N, seed_ptr, attn_threshold, attn_factor)
    own = start_m + tl.arange(0, BLOCK_M)
    y, x = grid_position(start_m, BLOCK_M, grid_w, P)
    slope = tl.where(own >= P, slope, 0.0)
    full = N // BLOCK_N * BLOCK_N

    if tl.program_id(0) % 2 == 0:
        k = load_rows(k_ptr, start_m, BLOCK_M, stride_kn, N, D, BLOCK_D, False)
        v = load_rows(v_ptr, start_m, BLOCK_M, stride_vn, N, D, BLOCK_D, False)
        queries = (q_ptr, do_ptr, o_ptr, stats_ptr, stride_qn, stride_don, stride_on, center_y, center_x)
        keys = (own, start_m, y, x, slope, center_sq, h, grid_w, rpe_ptr)
        dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, full, BLOCK_N):
            dk, dv = _bwd_kv_step(
                (dk, dv), (k, v), queries, keys, start, N, scale_log2, drop, D, BLOCK_D, P, RPE, ATTN, BLOCK_N, True
            )
        if TAIL > 0:
            dk, dv = _bwd_kv_step(
                (dk, dv), (k, v), queries, keys, full, N, scale_log2, drop, D, BLOCK_D, P, RPE, ATTN, TAIL, False
            )
        store_rows(dk_ptr + grad_offset, start_m, BLOCK_M, H * D, dk * scale, N, D, BLOCK_D)
        store_rows(dv_ptr + grad_offset, start_m, BLOCK_M, H * D, dv, N, D, BLOCK_D)
    else:
        q = load_rows(q_ptr, start_m, BLOCK_M, stride_qn, N, D, BLOCK_D, False)
        do = load_rows(do_ptr, start_m, BLOCK_M, stride_don, N, D, BLOCK_D, False)
        o = load_rows(o_ptr, start_m, BLOCK_M, stride_on, N, D, BLOCK_D, False)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        top = tl.load(stats_ptr + own, mask=own < N, other=float("inf"))
        row_tiles = (q, do, delta, top)
        rows = (y + center_y, x + center_x, slope, center_sq, h, grid_w, rpe_ptr)
        kv = (k_ptr, v_ptr, stride_kn, stride_vn)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        s_r = tl.zeros((BLOCK_M,), tl.float32)
        s_u = tl.zeros((BLOCK_M,), tl.float32)
        s_w = tl.zeros((BLOCK_M,), tl.float32)
        s_1 = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, full, BLOCK_N):
            sums = (dq, s_r, s_u, s_w, s_1)
            dq, s_r, s_u, s_w, s_1 = _bwd_q_step(
                sums, row_tiles, rows, own, kv, start, N, scale_log2, drop, D, BLOCK_D, P, RPE, ATTN, BLOCK_N, True
            )
        if TAIL > 0:
            sums = (dq, s_r, s_u, s_w, s_1)
            dq, s_r, s_u, s_w, s_1 = _bwd_q_step(
                sums, row_tiles, rows, own, kv, full, N, scale_log2, drop, D, BLOCK_D, P, RPE, ATTN, TAIL, False
            )
        per_sum = 1.0 / tl.load(stats_ptr + N + own, mask=own < N, other=1.0)
        store_rows(dq_ptr + grad_offset, start_m, BLOCK_M, H * D, dq * (per_sum * scale)[:, None], N, D, BLOCK_D)
        part_ptr += h * 3 * S + b * blocks + block
        patch = (own >= P) & (own < N)  # the others may hold NaN
        s_r = tl.where(patch, per_sum * s_r, 0.0)[None, :]  # two dimensions: Triton 3.6 cannot reduce one on Blackwell
        s_u = tl.where(patch, per_sum * (s_u + center_y * s_1), 0.0)[None, :]
        s_w = tl.where(patch, per_sum * (s_w + center_x * s_1), 0.0)[None, :]
        tl.store(part_ptr, tl.sum(s_r))
        tl.store(part_ptr + S, tl.sum(s_u))
        tl.store(part_ptr + 2 * S, tl.sum(s_w))


@triton.jit(do_not_specialize=SCALARS)
def _bwd_reduce_kernel(part_ptr, alpha_ptr, dalpha_ptr, dcenter_ptr, S, rpe_factor, BLOCK: tl.constexpr):
    """part: (H, 3, S) float32 -> dalpha: (H,), dcenter: (H, 2), in a fixed order. Program: a head."""
    h = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sum_r = tl.zeros((BLOCK,), tl.float32)
    sum_y = sum_r
    sum_x = sum_r
    for start in range(0, S, BLOCK):
        ptrs = part_ptr + h * 3 * S + start + lane
        inside = start + lane < S
        sum_r += tl.load(ptrs, mask=inside, other=0.0)
        sum_y += tl.load(ptrs + S, mask=inside, other=0.0)
        sum_x += tl.load(ptrs + 2 * S, mask=inside, other=0.0)
    alpha = tl.load(alpha_ptr + h)
    tl.store(dalpha_ptr + h, -rpe_factor * tl.sum(sum_r, 0))
    tl.store(dcenter_ptr + 2 * h, alpha * (2.0 * rpe_factor * tl.sum(sum_y, 0)))
    tl.store(dcenter_ptr + 2 * h + 1, alpha * (2.0 * rpe_factor * tl.sum(sum_x, 0)))


def mhca_attention_fwd(
    q, k, v, alpha, center, seed, grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout
):
    """out (B, H, N, D), laid out as (B, N, H, D), and stats (B, H, 2, N) float32: each row's largest score, in
    units of log 2, and the sum of its exponentials from there. Arguments: the native op's.

    q, k, v: (B, H, N, D), any strides. alpha: (H,), center: (H, 2), float32. seed: one int64, read where a p > 0.
    RuntimeError for a dtype or a size that the kernels do not take.
    """
    limits.check("mhca_attention", limits.attention(q))
    B, H, N, D = q.shape
    out = config.empty_rows(q)
    stats = q.new_empty((B, H, 2, N), dtype=torch.float32)
    if out.numel() == 0:
        return out, stats.zero_()
    q, k, v = config.dense_rows(q), config.dense_rows(k), config.dense_rows(v)
    dim = config.block_dim(D)
    tile, resident = config.forward_tile(config.chip_of(q), q.element_size(), N, dim, attn_dropout > 0)
    rpe_threshold, rpe_factor = threshold_and_factor(rpe_dropout)
    attn_threshold, attn_factor = threshold_and_factor(attn_dropout)
    with config.device_guard(q):
        rpe = rpe_mask(seed, H, N, num_prefix_tokens, rpe_threshold) if rpe_dropout > 0 else None
        mhca_attention_fwd_kernel[(B * H if resident else -(-N // tile.block_m) * B * H,)](
            q, k, v, alpha.contiguous(), center.contiguous(), seed if attn_dropout > 0 else None, rpe, out, stats,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            H, N, max(grid_w, 1), float(scale), rpe_factor, attn_threshold, attn_factor,
            D, dim, num_prefix_tokens, rpe is not None, attn_dropout > 0,
            tile.block_m, tile.block_n, config.tail(N, tile.block_n), resident,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
    return out, stats


def mhca_attention_bwd(
    grad_out, q, k, v, alpha, center, out, stats, seed,
    grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout,
):  # fmt: skip
    """Gradients to q, k, v (laid out as `out`), alpha and center (float32). Arguments: the native op's.

    grad_out: (B, H, N, D), any strides. out, stats: what the forward gave. Errors as there.
    """
    limits.check("mhca_attention", limits.attention(q))
    B, H, N, D = q.shape
    dq, dk, dv = config.empty_rows(q), config.empty_rows(q), config.empty_rows(q)
    dalpha, dcenter = alpha.new_empty(alpha.shape), center.new_empty(center.shape)
    if q.numel() == 0:
        return dq, dk, dv, dalpha.zero_(), dcenter.zero_()
    do, q, k, v, out = (config.dense_rows(x) for x in (grad_out, q, k, v, out))
    alpha, stats = alpha.contiguous(), stats.contiguous()
    dim = config.block_dim(D)
    tile = config.backward_tile(config.chip_of(q), q.element_size(), dim, attn_dropout > 0, rpe_dropout > 0)
    rpe_threshold, rpe_factor = threshold_and_factor(rpe_dropout)
    attn_threshold, attn_factor = threshold_and_factor(attn_dropout)
    blocks = -(-N // tile.block_m)
    with config.device_guard(q):
        rpe = rpe_mask(seed, H, N, num_prefix_tokens, rpe_threshold) if rpe_dropout > 0 else None
        partials = alpha.new_empty((H, 3, B * blocks))
        mhca_attention_bwd_kernel[(2 * blocks * B * H,)](
            do, q, k, v, alpha, center.contiguous(), out, stats, seed if attn_dropout > 0 else None, rpe,
            dq, dk, dv, partials,
            *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            H, N, max(grid_w, 1), B * blocks, float(scale), rpe_factor, attn_threshold, attn_factor,
            D, dim, num_prefix_tokens, rpe is not None, attn_dropout > 0,
            tile.block_m, tile.block_n, config.tail(N, tile.block_n),
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
        _bwd_reduce_kernel[(H,)](
            partials, alpha, dalpha, dcenter, B * blocks, rpe_factor, BLOCK=512, enable_fp_fusion=True
        )
    return dq, dk, dv, dalpha, dcenter
