"""Tile sizes of the Triton mhca_attention kernels: one small table, no tuning at run time."""

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int  # tokens of the side that a program owns
    block_n: int  # tokens of the side that it walks along; at most 64
    num_warps: int
    num_stages: int


def block_dim(head_dim: int) -> int:
    """The head dimension rounded up to what tl.dot takes: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tail(tokens: int, block: int) -> int:
    """Width of the last, partial tile: 0 where there is none, else 16, 32, ... up to `block`."""
    rest = tokens % block
    return 0 if rest == 0 else min(block, max(16, 1 << (rest - 1).bit_length()))


def forward_tile(itemsize: int, dim: int) -> Tile:
    if itemsize == 4:
        return Tile(32, 32, 4, 1)
    if dim <= 64:
        return Tile(64, 64, 4, 2)
    return Tile(64, 64, 4, 2) if dim <= 128 else Tile(64, 32, 8, 1)


def backward_tile(itemsize: int, dim: int) -> Tile:
    if itemsize == 4:
        return Tile(32, 32, 4, 1)
    if dim <= 64:
        return Tile(64, 64, 4, 2)
    return Tile(64, 32, 8, 1)
