"""Philox4x32-10 in PyTorch: the random bits of `kernels/common/philox.h`, bit for bit, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device | str | None = None) -> Tensor:
    """A one-element int64 seed from torch's generator of `device`."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def drop_threshold(p: float) -> int:
    """An element is kept where its random word is at least this."""
    return min(int(p * 2.0**32), _MASK)


def keep_factor(p: float) -> float:
    """What a kept element is multiplied with: 1 / (1 - p), and 0 where everything is dropped."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def random_words(seed: int | Tensor, count: int, stream: int, device: torch.device | str | None = None) -> Tensor:
    """The first `count` 32-bit words of a stream, as int64 (count,).

    seed: int, or one-element int64 tensor. Word e is output e & 3 of the counter (e >> 2, stream) under the key `seed`.
    """
    if isinstance(seed, Tensor):
        device = seed.device if device is None else device
        seed = seed.reshape(()).to(device)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    counter = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    x0, x1 = counter & _MASK, counter >> 32
    x2, x3 = torch.full_like(counter, stream), torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        # The products wrap around in int64: their 64 bits are right, and the shift's sign bits are masked away.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x2 = ((product1 >> 32) & _MASK) ^ x1 ^ key0, ((product0 >> 32) & _MASK) ^ x3 ^ key1
        x1, x3 = product1 & _MASK, product0 & _MASK
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((x0, x1, x2, x3), dim=-1).reshape(-1)[:count]


def keep_mask(
    seed: int | Tensor, shape: tuple[int, ...], p: float, stream: int, device: torch.device | str | None = None
) -> Tensor:
    """True where dropout with probability `p` keeps an element; bool of the given shape.

    An element's word is the one of its row-major index in `shape`, so the mask depends on nothing else.
    """
    count = 1
    for size in shape:
        count *= size
    return (random_words(seed, count, stream, device) >= drop_threshold(p)).reshape(shape)
