"""Philox4x32-10 for Triton: the random bits of kernels/common/philox.h, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def _group_bits(seed, stream: tl.constexpr, group, threshold):
    """Keep bits of elements 4 * group ... 4 * group + 3 in the low bits of an int64. group: int64 tensor."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = c0 * 0 + stream
    c3 = c0 * 0
    for _ in range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    bits = (c0 >= threshold).to(tl.int64) | ((c1 >= threshold).to(tl.int64) << 1)
    return bits | ((c2 >= threshold).to(tl.int64) << 2) | ((c3 >= threshold).to(tl.int64) << 3)


@triton.jit
def keep_bits(seed, stream: tl.constexpr, first, threshold, COLS: tl.constexpr):
    """Keep bits of the elements first, first + 1, ..., first + COLS - 1: bit c for element first + c.

    first: (R,) int64. threshold: int32 with the bits of the uint32. COLS: 16, 32 or 64. Result: (R,) int64.
    One Philox call serves four neighbours, though a row need not begin on a multiple of four.
    """
    threshold = threshold.to(tl.uint32, bitcast=True)
    group = first >> 2
    shift = first & 3
    lane = tl.arange(0, COLS // 4)
    inner = _group_bits(seed, stream, group[:, None] + lane[None, :], threshold) << (4 * lane)[None, :]
    bits = tl.sum(inner, axis=1).to(tl.uint64, bitcast=True) >> shift.to(tl.uint64)
    last = _group_bits(seed, stream, group + COLS // 4, threshold)
    return bits.to(tl.int64, bitcast=True) | ((last << 1) << (COLS - 1 - shift))


def threshold_and_factor(p: float) -> tuple[int, float]:
    """Dropout with probability p: the least word that is kept, a uint32 as int32, and the factor of what is kept."""
    threshold = min(int(p * 4294967296.0), 0xFFFFFFFF)
    return threshold - (threshold >> 31 << 32), 1.0 / (1.0 - p) if p < 1.0 else 0.0
