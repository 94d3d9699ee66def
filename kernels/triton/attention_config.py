"""Host side of the Triton attention kernels: one small table of tile sizes, and layouts."""

import contextlib
import functools
from typing import NamedTuple

import torch

from fastib._gpu_limits import query_rows

MAX_ROW_STRIDE = 1 << 25
RESIDENT_TOKENS = 256  # K and V of this many tokens, 64 wide and 16-bit, take 64 KB


class Tile(NamedTuple):
    block_m: int  # tokens that a program owns
    block_n: int  # tokens of a step along the other side; at most 64
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def forward_tile(chip: int, itemsize: int, tokens: int, dim: int, attn_dropout: bool) -> tuple[Tile, int]:
    """The tile, and the number of full tiles of keys if one program keeps all K and V of a head on chip, else 0.

    chip: major compute capability. dim: what block_dim gives. Random bits take registers: tiles are smaller with them.
    """
    rows = query_rows(itemsize, dim)
    if itemsize == 4:
        small = dim > 128 and chip not in (9, 10)  # 99 KB of shared memory
        return Tile(rows, 16 if small else 32, 8, 1, 255), 0
    if dim > 128:
        return Tile(rows, 16, 8, 1), 0
    if attn_dropout:
        return Tile(rows, 32, 4 if dim <= 64 else 8, 1), 0
    if chip not in (9, 10) or dim > 64:
        return Tile(rows, 32, 4, 2), 0
    if 64 < tokens <= RESIDENT_TOKENS:
        return Tile(rows, 32, 4, 1), tokens // 32
    return Tile(rows, 64, 4, 2), 0


def backward_tile(chip: int, itemsize: int, dim: int, attn_dropout: bool, rpe_dropout: bool = False) -> Tile:
    """Without spills up to a head dimension of 64; a few in 16 bits above."""
    if itemsize == 4:
        return Tile(32 if dim <= 32 else 16, 32, 8, 1, 255)
    if dim > 64:
        return Tile(64, 16, 8, 1) if chip in (9, 10) else Tile(32, 32, 8, 1)
    hopper = chip in (9, 10)
    if attn_dropout:
        return Tile(64, 32 if hopper and dim <= 32 else 16, 8, 1)
    if hopper and dim <= 32 and not rpe_dropout:
        return Tile(64, 32, 4, 2, 168)  # three programs on a processor; unasked, ptxas takes registers for two
    return Tile(64, 32, 4, 2) if hopper else Tile(64, 32, 8, 1)


def block_dim(head_dim: int) -> int:
    """The head dimension rounded up to what tl.dot takes: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tail(tokens: int, block: int) -> int:
    """Width of the last, partial tile: 0 where there is none, else 16, 32, ... up to `block`."""
    rest = tokens % block
    return 0 if rest == 0 else min(block, max(16, 1 << (rest - 1).bit_length()))


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied where its rows are not dense or so far apart that 32 bits do not reach across a tile."""
    _, _, row, column = x.stride()
    return x if (column == 1 or x.shape[3] == 1) and row < MAX_ROW_STRIDE else x.contiguous()


def empty_rows(q: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) laid out as a dense (B, N, H, D)."""
    B, H, N, D = q.shape
    return q.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1))


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _major(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def chip_of(x: torch.Tensor) -> int:
    """Major compute capability; Hopper's where Triton interprets on a CPU."""
    return _major(x.get_device()) if x.is_cuda else 9
