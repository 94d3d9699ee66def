"""The patch grid of a sequence of tokens."""

from __future__ import annotations

import math


def patch_grid(module: str, grid_size: tuple[int, int], tokens: int, num_prefix_tokens: int) -> tuple[int, int]:
    """`grid_size` where the patches fill it; where they fill another square, a square gives way to that.

    So an image of another size passes through. ValueError, naming `module`, where the patches fill neither.
    """
    patches, (grid_h, grid_w) = tokens - num_prefix_tokens, grid_size
    if patches == grid_h * grid_w:
        return grid_size
    side = math.isqrt(max(patches, 0))
    if grid_h == grid_w and side * side == patches:
        return side, side
    expected = f"{num_prefix_tokens} + {grid_h} x {grid_w} tokens"
    raise ValueError(
        f"{module}: x must have {expected}, got N={tokens}; set grid_size where the patch grid has changed"
    )
