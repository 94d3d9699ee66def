"""The position term of mhca_attention in Triton, and its dropout mask, one bit an element."""

import torch

import triton
import triton.language as tl

from .attention_tile import LOG2E
from .philox import keep_bits

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a float32 to an integer
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
RPE_STREAM = tl.constexpr(1)  # element (h N + i) N + j


@triton.jit
def grid_position(start, WIDTH: tl.constexpr, grid_w, P: tl.constexpr):
    """Row and column of tokens start ... start + WIDTH - 1 as float32; of no meaning for prefix tokens.

    g // width is (g + 1/2) / width - 1/2 rounded to the nearest, exact below 2^20 tokens.
    """
    width = grid_w.to(tl.float32)
    g = tl.arange(0, WIDTH).to(tl.float32) + (tl.zeros((), tl.int32) + start - P).to(tl.float32)
    y = (g * (1.0 / width) + (0.5 / width - 0.5)) + ROUND - ROUND
    return y, g - y * width


@triton.jit
def head_position(alpha_ptr, center_ptr, h, rpe_factor):
    """(-alpha log2(e) / (1 - p), center row, center column, |center|^2) of head h.

    The first is NaN where alpha or |center|^2 is not finite, and finite otherwise, like the rest always: prefix tokens,
    whose slope is 0, have no NaN from it.
    """
    alpha = tl.load(alpha_ptr + h)
    c_y = tl.load(center_ptr + 2 * h)
    c_x = tl.load(center_ptr + 2 * h + 1)
    center_sq = tl.fma(c_y, c_y, c_x * c_x)
    finite = center_sq < float("inf")
    slope = tl.minimum(tl.maximum(-alpha * rpe_factor * LOG2E, -LARGEST), LARGEST)
    slope = tl.where(finite & (tl.abs(alpha) < float("inf")), slope, float("nan"))
    return slope, tl.where(finite, c_y, 0.0), tl.where(finite, c_x, 0.0), tl.where(finite, center_sq, 0.0)


@triton.jit
def position_exponent(slope, y_i, x_i, y_j, x_j, center_sq, inside, MASKED: tl.constexpr):
    """The position term of a tile in base 2, and what its gradient needs: u, w = d - center and
    r = |d|^2 - 2 center . d = u^2 + w^2 - |center|^2.

    y_i, x_i: queries, moved by the center already. slope: -alpha log2(e) / (1 - p), 0 on those of the tile's rows that
    are prefix tokens. inside: where the term acts, if MASKED. All broadcast to the tile.
    """
    u = y_j - y_i
    w = x_j - x_i
    r = tl.fma(u, u, tl.fma(w, w, -center_sq))  # fused alike in every kernel, as score_tile is
    bias = slope * r
    if MASKED:
        bias = tl.where(inside, bias, 0.0)
    return bias, u, w, r


@triton.jit
def rpe_bits(rpe_ptr, h, i, start, N, WIDTH: tl.constexpr):
    """Position mask bits of rows i, columns start ... start + WIDTH - 1 (inside one 64-bit word). i: (R,)."""
    words = (N + 63) // 64
    bits = tl.load(rpe_ptr + (h * N + i) * words + start // 64, mask=i < N, other=0) >> (start % 64)
    return bits.to(tl.int32) if WIDTH <= 32 else bits


@triton.jit(do_not_specialize=["N", "S", "rpe_threshold"])
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


def rpe_mask(seed, H, N, num_prefix_tokens, threshold):
    """The kept entries of the (H, N, N) position term, one bit each: (H, N, ceil(N / 64)) int64."""
    words = (N + 63) // 64
    mask = torch.empty((H, N, words), dtype=torch.int64, device=seed.device)
    grid = ((H * N + 63) // 64, words)
    _rpe_mask_kernel[grid](mask, seed, N, H * N, threshold, P=num_prefix_tokens, BLOCK=64, num_warps=4)
    return mask
