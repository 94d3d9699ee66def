"""Random numbers as a function of where a run is, never of how it came there.

Every use of randomness (the order of an epoch, the augmentation of a sample, a training step) is seeded from the run's
seed and its own position. A resumed run therefore needs no saved generator state, and neither the number of loader
processes nor an evaluation in between changes what follows.
"""

from __future__ import annotations

# ruff: noqa: NPY002 (timm draws from NumPy's global generator)
import hashlib
import random
from contextlib import contextmanager

import numpy as np
import torch

ORDER, AUGMENT, STEP = range(3)  # what a seed is for


def derive(*parts: int) -> int:
    """A 63-bit seed that depends on all of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive(*parts))


def seed_all(*parts: int) -> None:
    """Seed Python's, NumPy's and torch's (CPU and accelerators) global generators from `parts`."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextmanager
def seeded(*parts: int):
    """`seed_all` for the CPU generators inside the block; afterwards they are where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
