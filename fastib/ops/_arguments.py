"""What every operator does with its arguments: checks that name the one that is wrong, casts and seeds."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from fastib import _gpu_limits as limits
from fastib.reference.philox import draw_seed

DTYPES = (*limits.DTYPES, torch.float64)


def check_tensors(op: str, /, **arguments: Any) -> None:
    """Raises ValueError where an argument is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise invalid(op, name, "a tensor", type(value).__name__)


def check_optional(op: str, /, **argument: Any) -> None:
    """Raises ValueError where an argument is neither None nor a tensor."""
    for name, value in argument.items():
        if value is not None and not isinstance(value, Tensor):
            raise invalid(op, name, "None or a tensor", type(value).__name__)


def check_dtype(op: str, argument: str, tensor: Tensor) -> None:
    """Raises ValueError for a dtype that no kernel computes in."""
    if tensor.dtype not in DTYPES:
        raise invalid(op, argument, "float32, bfloat16, float16 or float64", tensor.dtype)


def is_autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    kind = "cpu" if x.is_cpu else x.device.type  # which takes longer to ask for
    return kind != "meta" and torch.is_autocast_enabled(kind)  # PyTorch knows no autocast of meta


def autocast(*tensors: Any) -> Any:
    """The tensors in the autocast dtype where autocast is on; float64 stays, as in PyTorch, and so does None."""
    if not is_autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    kept = (t is None or t.dtype == torch.float64 or not t.is_floating_point() for t in tensors)
    return tuple(t if keep else t.to(dtype) for t, keep in zip(tensors, kept, strict=True))


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a one-element int64 tensor on `device`; drawn from torch's generator where it is None."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise invalid(op, "seed", "one int64 element", f"{seed.dtype} {tuple(seed.shape)}")
        check_device(op, "seed", seed, device)
        return seed
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise invalid(op, "seed", "None, an int or a one-element int64 tensor", repr(seed))
    seed = integer(op, "seed", seed, -(2**63))
    if seed >= 2**63:
        raise invalid(op, "seed", "a 64-bit signed integer", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def invalid(op: str, argument: str, expected: object, got: object) -> ValueError:
    """The error for a wrong shape, dtype or range."""
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_device(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    """Raises RuntimeError where `tensor` is not on `device`."""
    if tensor.device != device:
        raise RuntimeError(f"{op}: {argument} must be on {device} like the other inputs, got {tensor.device}")


def check_probability(op: str, argument: str, p: float) -> None:
    """Raises ValueError where `p` is not a probability."""
    try:
        valid = 0.0 <= p <= 1.0
    except TypeError:
        valid = False
    if not valid:
        raise invalid(op, argument, "a probability in [0, 1]", repr(p))


def check_finite(op: str, argument: str, x: float) -> None:
    """Raises ValueError where `x` is not a finite number. A compiler may know it as a symbol alone."""
    if torch.compiler.is_compiling():
        return
    try:
        valid = math.isfinite(x)
    except (TypeError, OverflowError):
        valid = False
    if not valid:
        raise invalid(op, argument, "a finite number", repr(x))


def integer(op: str, argument: str, n: Any, lowest: int = 0) -> int:
    """`n` as an int. Raises ValueError where it is none, a bool, or below `lowest`."""
    if isinstance(n, bool):
        raise invalid(op, argument, "an int", n)
    if not isinstance(n, (int, torch.SymInt)):
        try:
            n = operator.index(n)
        except TypeError:
            raise invalid(op, argument, "an int", repr(n)) from None
    if n < lowest:
        raise invalid(op, argument, f"{lowest} or more", n)
    return n


def grid(op: str, grid_size: Any) -> tuple[int, int]:
    """(grid_h, grid_w), of a pair or of one int for a square. Raises ValueError for anything else."""
    try:
        grid_h, grid_w = (grid_size, grid_size) if hasattr(grid_size, "__index__") else grid_size
        return integer(op, "grid_size", grid_h), integer(op, "grid_size", grid_w)
    except (TypeError, ValueError):
        expected = "an int or a pair (grid_h, grid_w) of ints, none negative"
        raise invalid(op, "grid_size", expected, repr(grid_size)) from None


def default_scale(head_dim: int | torch.SymInt | Tensor) -> float:
    """head_dim^-1/2; as a number, where `torch.jit.trace` would take the power of a float32 tensor."""
    size = max(head_dim, 1)
    return (torch.sym_float(size) if isinstance(size, Tensor) else size) ** -0.5
