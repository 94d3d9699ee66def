"""Attention over N tokens and T extra ones, averaged into row 0, on a GPU (DHVT, Sec. 3.3), forward and backward.

    a = softmax(scale [q; q_extra] [k; k_extra]^T), with dropout, o = a [v; v_extra],
    out_0 = o_0 + mean_t o_(N + t), out_i = o_i

The tokens are never joined in memory: a tile whose rows come from both tensors selects its pointers row by row. Among
the keys and in the dropout mask the extra tokens come last. Among the forward's queries they come first, so that the
program of the first block, T < BLOCK_M, owns them and row 0, and adds their mean to it in registers; their outputs are
not stored. In the backward each of them has 1 / T of row 0's gradient; a sum of its softmax that is T times as large
does that. What other rows get from their output and its gradient, those T + 1 get from a kernel of their own, which
sums probabilities times their gradients over the keys. No atomics.

Floor per (batch, head), 16-bit, L = N + T: 8 L D bytes and 4 L^2 D FLOP forward, 16 L D bytes and 10 L^2 D FLOP
backward, and 4 L D bytes of K and V once more.
"""

import torch

import triton
import triton.language as tl
from fastib import _gpu_limits as limits

from . import attention_config as config
from .attention_tile import (
    LOG2E,
    attn_bits,
    bit,
    bwd_kv_tile,
    bwd_q_tile,
    fwd_tile,
    joined_pointers,
    load_at,
    load_rows,
    row_pointers,
    score_tile,
    store_at,
)
from .philox import threshold_and_factor

NAME = "head_token_attention"
SCALARS = ["H", "N", "T", "attn_threshold"]  # never specialised on their value


@triton.jit
def _load_joined(
    x, start, ROWS: tl.constexpr, N, T, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr, JOIN: tl.constexpr
):
    """Rows start ... start + ROWS - 1 of N tokens and T extra ones behind them. JOIN: some may be extra tokens."""
    ptr, stride, extra_ptr, extra_stride = x
    if JOIN:
        j = start + tl.arange(0, ROWS)
        ptrs = joined_pointers(ptr, start, ROWS, stride, extra_ptr, j - N, extra_stride, j >= N, BLOCK_D)
        return load_at(ptrs, j < N + T, D, BLOCK_D)
    else:
        return load_rows(ptr, start, ROWS, stride, N, D, BLOCK_D, FULL)


@triton.jit
def _load_queries(
    x, i, start, ROWS: tl.constexpr, N, T, D: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL: tl.constexpr, EXTRA: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """q and grad_out of rows i = start ... start + ROWS - 1, and of each the sum over keys of a probability times its
    gradient, the largest score, and one over the sum of exponentials from there, (ROWS,). Extra tokens have row 0's
    gradient; the first sums of theirs, and of its own, are known."""
    q_rows, do_ptr, stride_don, o_ptr, stride_on, delta_ptr, stats_ptr = x
    q = _load_joined(q_rows, start, ROWS, N, T, D, BLOCK_D, FULL, JOIN)
    do = _load_joined((do_ptr, stride_don, do_ptr, 0), start, ROWS, N, T, D, BLOCK_D, FULL, JOIN)
    o = load_rows(o_ptr, start, ROWS, stride_on, N, D, BLOCK_D, FULL and not JOIN)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if EXTRA:
        known = (i == 0) | ((i >= N) & (i < N + T))
        delta = tl.where(known, tl.load(delta_ptr + tl.where(i == 0, T, i - N), mask=known, other=0.0), delta)
    row = tl.where(i < N, i + T, i - N)
    top = tl.load(stats_ptr + row, mask=i < N + T, other=float("inf"))
    norm = tl.load(stats_ptr + N + T + row, mask=i < N + T, other=1.0)
    if JOIN:
        norm *= tl.where(i >= N, T.to(tl.float32), 1.0)
    return q, do, delta, top, 1.0 / norm


@triton.jit
def _store_joined(
    ptr, extra_ptr, b, h, H, start, ROWS: tl.constexpr, value, N, T, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows start ... start + ROWS - 1 of the pair (b, h), tokens into a dense (B, N, H, D), the rest (B, T, H, D)."""
    j = start + tl.arange(0, ROWS)
    ptr += (b * N * H + h) * D
    extra_ptr += (b * T * H + h) * D
    ptrs = joined_pointers(ptr, start, ROWS, H * D, extra_ptr, j - N, H * D, j >= N, BLOCK_D)
    store_at(ptrs, value, j < N + T, D, BLOCK_D)


@triton.jit(do_not_specialize=SCALARS)
def head_token_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, qx_ptr, kx_ptr, vx_ptr, seed_ptr, out_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_qxb, stride_qxh, stride_qxn, stride_kxb, stride_kxh, stride_kxn, stride_vxb, stride_vxh, stride_vxn,
    H, N, T, scale, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr, JOIN: tl.constexpr, ATTN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M queries, extra tokens first, of one (batch, head); where RESIDENT > 0, all of them.

    RESIDENT: the number of full tiles of keys, where all K and V stay on chip: memory is then read once. EXTRA: T > 0.
    JOIN: full tiles of keys reach the extra ones; else only the last, partial tile does.
    """
    tokens = N + T
    if RESIDENT > 0:
        bh = tl.program_id(0).to(tl.int64)
        begin = 0
        end = tokens
    else:
        blocks = tl.cdiv(tokens, BLOCK_M)
        bh = tl.program_id(0).to(tl.int64) // blocks
        begin = (tl.program_id(0) % blocks) * BLOCK_M
        end = begin + BLOCK_M
    b = bh // H
    h = bh % H
    q_ptr += b * stride_qb + h * stride_qh
    qx_ptr += b * stride_qxb + h * stride_qxh
    k_rows = (k_ptr + b * stride_kb + h * stride_kh, stride_kn, kx_ptr + b * stride_kxb + h * stride_kxh, stride_kxn)
    v_rows = (v_ptr + b * stride_vb + h * stride_vh, stride_vn, vx_ptr + b * stride_vxb + h * stride_vxh, stride_vxn)
    out_ptr += (b * N * H + h) * D
    stats_ptr += 2 * bh * tokens

    scale_log2 = scale * LOG2E
    drop = (bh, tokens, seed_ptr, attn_threshold, attn_factor)
    full = tokens // BLOCK_N * BLOCK_N
    k_tiles = ()
    v_tiles = ()
    for t in tl.static_range(RESIDENT):
        k_tiles = k_tiles + (_load_joined(k_rows, t * BLOCK_N, BLOCK_N, N, T, D, BLOCK_D, True, JOIN),)  # noqa: RUF005
        v_tiles = v_tiles + (_load_joined(v_rows, t * BLOCK_N, BLOCK_N, N, T, D, BLOCK_D, True, JOIN),)  # noqa: RUF005
    if TAIL > 0:
        k_tail = _load_joined(k_rows, full, TAIL, N, T, D, BLOCK_D, False, EXTRA)
        v_tail = _load_joined(v_rows, full, TAIL, N, T, D, BLOCK_D, False, EXTRA)

    for start_m in range(begin, end, BLOCK_M):
        row = start_m + tl.arange(0, BLOCK_M)
        i = tl.where(row < T, N + row, row - T)
        if EXTRA:
            ptrs = joined_pointers(q_ptr, start_m - T, BLOCK_M, stride_qn, qx_ptr, row, stride_qxn, row < T, BLOCK_D)
            q = load_at(ptrs, row < tokens, D, BLOCK_D)
        else:
            q = load_rows(q_ptr, start_m, BLOCK_M, stride_qn, N, D, BLOCK_D, False)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        m = tl.full((BLOCK_M,), -3.0e38, tl.float32)  # finite: the scores of a tile may all be -infinity
        norm = tl.zeros((BLOCK_M,), tl.float32)
        if RESIDENT > 0:
            for t in tl.static_range(RESIDENT):
                acc, m, norm = fwd_tile(
                    (acc, m, norm), (q, k_tiles[t], v_tiles[t]), None, i, t * BLOCK_N, tokens, scale_log2, drop,
                    ATTN, BLOCK_N, True,
                )  # fmt: skip
        else:
            for start in range(0, full, BLOCK_N):
                k = _load_joined(k_rows, start, BLOCK_N, N, T, D, BLOCK_D, True, JOIN)
                v = _load_joined(v_rows, start, BLOCK_N, N, T, D, BLOCK_D, True, JOIN)
                acc, m, norm = fwd_tile(
                    (acc, m, norm), (q, k, v), None, i, start, tokens, scale_log2, drop, ATTN, BLOCK_N, True
                )
        if TAIL > 0:
            acc, m, norm = fwd_tile(
                (acc, m, norm), (q, k_tail, v_tail), None, i, full, tokens, scale_log2, drop, ATTN, TAIL, False
            )
        tl.store(stats_ptr + row, m, mask=row < tokens)
        tl.store(stats_ptr + tokens + row, norm, mask=row < tokens)
        out = acc * (1.0 / norm)[:, None]
        if EXTRA:  # noqa: SIM102
            if start_m == 0:  # the extra tokens and row 0, which is row T here
                weight = tl.where(row < T, 1.0 / T.to(tl.float32), 1.0)[:, None]
                total = tl.sum(tl.where((row <= T)[:, None], out * weight, 0.0), 0)
                dims = tl.arange(0, BLOCK_D)
                tl.store(out_ptr + dims, total.to(out_ptr.dtype.element_ty), mask=dims < D)
        first = T + 1 if EXTRA else 0
        ptrs = row_pointers(out_ptr, start_m - T, BLOCK_M, H * D, BLOCK_D)
        store_at(ptrs, out, (row >= first) & (row < tokens), D, BLOCK_D)


@triton.jit
def _delta_tile(
    queries, kv, i, start, tokens, scale_log2, drop, ATTN: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr
):
    """Sum over keys start ... start + WIDTH - 1 of the probabilities of queries i times their gradients, (ROWS,)."""
    q, do, top, per_sum = queries
    k, v = kv
    _, _, _, _, factor = drop
    lane = tl.arange(0, WIDTH)
    s = score_tile(q, k, None, scale_log2)
    p = tl.exp2(s - top[:, None]) * per_sum[:, None]
    if not FULL:
        p = tl.where((start + lane)[None, :] < tokens, p, 0.0)
    if ATTN:
        bits = attn_bits(drop, i, start, WIDTH)
        p = tl.where(bit(bits[:, None], lane[None, :]), p * factor, 0.0)
    return tl.sum(p * tl.sum(v.to(tl.float32) * do[None, :], 1)[None, :], 1)


@triton.jit(do_not_specialize=SCALARS)
def head_token_attention_delta_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, qx_ptr, kx_ptr, vx_ptr, stats_ptr, seed_ptr, delta_ptr,
    stride_dob, stride_doh, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_qxb, stride_qxh, stride_qxn, stride_kxb, stride_kxh, stride_kxn,
    stride_vxb, stride_vxh, stride_vxn,
    H, N, T, scale, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, JOIN: tl.constexpr, ATTN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Program: of one pair the T extra tokens, then token 0, which have one gradient: sum_j p_ij v_j . do_0."""
    tokens = N + T
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    h = bh % H
    k_rows = (k_ptr + b * stride_kb + h * stride_kh, stride_kn, kx_ptr + b * stride_kxb + h * stride_kxh, stride_kxn)
    v_rows = (v_ptr + b * stride_vb + h * stride_vh, stride_vn, vx_ptr + b * stride_vxb + h * stride_vxh, stride_vxn)
    row = tl.arange(0, ROWS)
    inside = row <= T
    q_ptrs = joined_pointers(
        q_ptr + b * stride_qb + h * stride_qh, -T, ROWS, stride_qn, qx_ptr + b * stride_qxb + h * stride_qxh, row,
        stride_qxn, row < T, BLOCK_D,
    )  # fmt: skip
    q = load_at(q_ptrs, inside, D, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    do = tl.load(do_ptr + b * stride_dob + h * stride_doh + dims, mask=dims < D, other=0.0).to(tl.float32)
    stats_ptr += 2 * bh * tokens
    top = tl.load(stats_ptr + row, mask=inside, other=float("inf"))
    per_sum = 1.0 / tl.load(stats_ptr + tokens + row, mask=inside, other=1.0)
    queries = (q, do, top, per_sum)

    scale_log2 = scale * LOG2E
    drop = (bh, tokens, seed_ptr, attn_threshold, attn_factor)
    i = tl.where(row < T, N + row, 0)
    full = tokens // BLOCK_N * BLOCK_N
    delta = tl.zeros((ROWS,), tl.float32)
    for start in range(0, full, BLOCK_N):
        k = _load_joined(k_rows, start, BLOCK_N, N, T, D, BLOCK_D, True, JOIN)
        v = _load_joined(v_rows, start, BLOCK_N, N, T, D, BLOCK_D, True, JOIN)
        delta += _delta_tile(queries, (k, v), i, start, tokens, scale_log2, drop, ATTN, BLOCK_N, True)
    if TAIL > 0:
        k = _load_joined(k_rows, full, TAIL, N, T, D, BLOCK_D, False, True)
        v = _load_joined(v_rows, full, TAIL, N, T, D, BLOCK_D, False, True)
        delta += _delta_tile(queries, (k, v), i, full, tokens, scale_log2, drop, ATTN, TAIL, False)
    tl.store(delta_ptr + bh * (T + 1) + row, delta, mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def head_token_attention_bwd_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, qx_ptr, kx_ptr, vx_ptr, o_ptr, delta_ptr, stats_ptr, seed_ptr,
    dq_ptr, dk_ptr, dv_ptr, dqx_ptr, dkx_ptr, dvx_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_qxb, stride_qxh, stride_qxn, stride_kxb, stride_kxh, stride_kxn,
    stride_vxb, stride_vxh, stride_vxn, stride_ob, stride_oh, stride_on,
    H, N, T, scale, attn_threshold, attn_factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr, JOIN: tl.constexpr, ATTN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Even program: dk and dv of BLOCK_M tokens of one (batch, head). Odd: their dq. Extra tokens come last in both.

    One launch, and each half recomputes the tiles: dq of all tokens does not fit in registers beside the rest.
    """
    tokens = N + T
    blocks = tl.cdiv(tokens, BLOCK_M)
    pair = tl.program_id(0) // 2
    bh = pair.to(tl.int64) // blocks
    start_m = (pair % blocks) * BLOCK_M
    b = bh // H
    h = bh % H
    q_rows = (q_ptr + b * stride_qb + h * stride_qh, stride_qn, qx_ptr + b * stride_qxb + h * stride_qxh, stride_qxn)
    k_rows = (k_ptr + b * stride_kb + h * stride_kh, stride_kn, kx_ptr + b * stride_kxb + h * stride_kxh, stride_kxn)
    v_rows = (v_ptr + b * stride_vb + h * stride_vh, stride_vn, vx_ptr + b * stride_vxb + h * stride_vxh, stride_vxn)
    do_ptr += b * stride_dob + h * stride_doh
    o_ptr += b * stride_ob + h * stride_oh
    delta_ptr += bh * (T + 1)
    stats_ptr += 2 * bh * tokens
    queries = (q_rows, do_ptr, stride_don, o_ptr, stride_on, delta_ptr, stats_ptr)

    scale_log2 = scale * LOG2E
    drop = (bh, tokens, seed_ptr, attn_threshold, attn_factor)
    own = start_m + tl.arange(0, BLOCK_M)
    full = tokens // BLOCK_N * BLOCK_N

    if tl.program_id(0) % 2 == 0:
        k = _load_joined(k_rows, start_m, BLOCK_M, N, T, D, BLOCK_D, False, EXTRA)
        v = _load_joined(v_rows, start_m, BLOCK_M, N, T, D, BLOCK_D, False, EXTRA)
        dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, full, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            tiles = _load_queries(queries, i, start, BLOCK_N, N, T, D, BLOCK_D, True, EXTRA, JOIN)
            dk, dv = bwd_kv_tile((dk, dv), (k, v), tiles, None, i, start_m, scale_log2, drop, ATTN, BLOCK_M)
        if TAIL > 0:
            i = full + tl.arange(0, TAIL)
            tiles = _load_queries(queries, i, full, TAIL, N, T, D, BLOCK_D, False, EXTRA, EXTRA)
            dk, dv = bwd_kv_tile((dk, dv), (k, v), tiles, None, i, start_m, scale_log2, drop, ATTN, BLOCK_M)
        _store_joined(dk_ptr, dkx_ptr, b, h, H, start_m, BLOCK_M, dk * scale, N, T, D, BLOCK_D)
        _store_joined(dv_ptr, dvx_ptr, b, h, H, start_m, BLOCK_M, dv, N, T, D, BLOCK_D)
    else:
        q, do, delta, top, per_sum = _load_queries(
            queries, own, start_m, BLOCK_M, N, T, D, BLOCK_D, False, EXTRA, EXTRA
        )
        row_tiles = (q, do, delta, top)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, full, BLOCK_N):
            k_tile = _load_joined(k_rows, start, BLOCK_N, N, T, D, BLOCK_D, True, JOIN)
            v_tile = _load_joined(v_rows, start, BLOCK_N, N, T, D, BLOCK_D, True, JOIN)
            dq, _ = bwd_q_tile(
                dq, row_tiles, (k_tile, v_tile), None, own, start, tokens, scale_log2, drop, ATTN, BLOCK_N, True
            )
        if TAIL > 0:
            k_tile = _load_joined(k_rows, full, TAIL, N, T, D, BLOCK_D, False, EXTRA)
            v_tile = _load_joined(v_rows, full, TAIL, N, T, D, BLOCK_D, False, EXTRA)
            dq, _ = bwd_q_tile(
                dq, row_tiles, (k_tile, v_tile), None, own, full, tokens, scale_log2, drop, ATTN, TAIL, False
            )
        dq = dq * (per_sum * scale)[:, None]
        _store_joined(dq_ptr, dqx_ptr, b, h, H, start_m, BLOCK_M, dq, N, T, D, BLOCK_D)


def head_token_attention_fwd(q, k, v, q_extra, k_extra, v_extra, seed, scale, attn_dropout):
    """out (B, H, N, D), laid out as (B, N, H, D); stats (B, H, 2, T + N) float32, of extra tokens, then tokens: each
    row's largest score, in units of log 2, and the sum of its exponentials from there. Arguments: the native op's.

    q, k, v: (B, H, N, D); the extra ones (B, H, T, D); any strides. seed: one int64, read where attn_dropout > 0.
    RuntimeError for a dtype or a size that the kernels do not take.
    """
    limits.check(NAME, limits.head_token_attention(q, q_extra))
    B, H, N, D = q.shape
    T = q_extra.shape[2]
    tokens = N + T
    dim = config.block_dim(D)
    tile, resident = config.forward_tile(config.chip_of(q), q.element_size(), tokens, dim, attn_dropout > 0)
    out = config.empty_rows(q)
    stats = q.new_empty((B, H, 2, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out, stats.zero_()
    inputs = [config.dense_rows(x) for x in (q, k, v, q_extra, k_extra, v_extra)]
    threshold, factor = threshold_and_factor(attn_dropout)
    with config.device_guard(q):
        head_token_attention_fwd_kernel[(B * H if resident else -(-tokens // tile.block_m) * B * H,)](
            *inputs, seed if attn_dropout > 0 else None, out, stats,
            *(stride for x in inputs for stride in x.stride()[:3]),
            H, N, T, float(scale), threshold, factor,
            D, dim, T > 0, tokens // tile.block_n * tile.block_n > N, attn_dropout > 0,
            tile.block_m, tile.block_n, config.tail(tokens, tile.block_n), resident,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
    return out, stats


def head_token_attention_bwd(grad_out, q, k, v, q_extra, k_extra, v_extra, out, stats, seed, scale, attn_dropout):
    """Gradients to q, k, v, q_extra, k_extra and v_extra, laid out as `out`. Arguments: the native op's.

    grad_out: (B, H, N, D), any strides. out, stats: what the forward gave. Errors as there.
    """
    limits.check(NAME, limits.head_token_attention(q, q_extra))
    B, H, N, D = q.shape
    T = q_extra.shape[2]
    tokens = N + T
    grads = [config.empty_rows(x) for x in (q, q, q, q_extra, q_extra, q_extra)]
    if q.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    inputs = [config.dense_rows(x) for x in (grad_out, q, k, v, q_extra, k_extra, v_extra, out)]
    dim = config.block_dim(D)
    stats, drop = stats.contiguous(), attn_dropout > 0
    numbers = (H, N, T, float(scale), *threshold_and_factor(attn_dropout))
    chip, seed = config.chip_of(q), seed if drop else None
    with config.device_guard(q):
        delta = stats.new_empty((B, H, T + 1))
        if T > 0:
            rows = max(16, triton.next_power_of_2(T + 1))
            tile, _ = config.forward_tile(chip, q.element_size(), tokens, dim, drop)
            width = tile.block_n
            head_token_attention_delta_kernel[(B * H,)](
                *inputs[:-1], stats, seed, delta,
                *inputs[0].stride()[:2], *(stride for x in inputs[1:-1] for stride in x.stride()[:3]),
                *numbers, D, dim, tokens // width * width > N, drop, rows, width, config.tail(tokens, width),
                num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
            )  # fmt: skip
        tile = config.backward_tile(chip, q.element_size(), dim, drop)
        head_token_attention_bwd_kernel[(-(-tokens // tile.block_m) * 2 * B * H,)](
            *inputs, delta, stats, seed, *grads,
            *(stride for x in inputs for stride in x.stride()[:3]), *numbers,
            D, dim, T > 0, tokens // tile.block_n * tile.block_n > N, drop,
            tile.block_m, tile.block_n, config.tail(tokens, tile.block_n),
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
    return tuple(grads)
