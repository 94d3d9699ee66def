"""Why the GPU kernels do not take an input: a sentence, or None where they do. Nothing here imports triton.

An operator asks before it chooses a backend, a launcher before it launches.
"""

from __future__ import annotations

import torch

from fastib._exporting import exporting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS, MAX_DIM, MAX_CHANNELS = 1 << 20, 256, 16384


def dtype(x: torch.Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"the GPU kernels take float32, bfloat16 or float16, got {x.dtype}"


def attention(q: torch.Tensor) -> str | None:
    """q: (B, H, N, D)."""
    if _above(q.shape[2], MAX_TOKENS) or _above(q.shape[3], MAX_DIM):
        return f"the Triton kernels take N <= {MAX_TOKENS} and D <= {MAX_DIM}, got {tuple(q.shape)}"
    return dtype(q)


def head_token_attention(q: torch.Tensor, q_extra: torch.Tensor) -> str | None:
    """q: (B, H, N, D). q_extra: (B, H, T, D); one program of the forward holds all T, and row 0."""
    reason = attention(q)
    if reason is not None:
        return reason
    dim, extra = q.shape[3], q_extra.shape[2]
    rows = query_rows(q.element_size(), dim)
    if _above(extra, rows - 1):
        return f"the Triton kernels take less than {rows} extra tokens in {q.dtype} with D={dim}, got T={extra}"
    return None


def feature_alignment(x: torch.Tensor) -> str | None:
    """x: (B, N, C)."""
    if _above(x.shape[2], MAX_CHANNELS):
        return f"the Triton kernels take up to {MAX_CHANNELS} channels, got {x.shape[2]}"
    return dtype(x)


def query_rows(itemsize: int, dim: int) -> int:
    """Queries that a program of the attention kernels' forward owns. dim: as it is, or rounded up to a power of two."""
    return 64 if itemsize == 2 else 32 if dim <= 64 else 16


def check(op: str, reason: str | None) -> None:
    """Raises RuntimeError where there is a reason."""
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}; pass backend='reference'")


def _above(size: int | torch.SymInt, limit: int) -> bool:
    """Whether `size` is above `limit`. Of an exported program's sizes only what is known counts: it has no guards."""
    if not torch.compiler.is_compiling():
        return size > limit
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    return statically_known_true(size > limit) if exporting() else guard_or_false(size > limit)
