"""What BatchNorm does beside normalising, for operators that normalise in its place."""

from __future__ import annotations

from torch import Tensor, nn


def takes_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether it normalises with the statistics of the batch."""
    return norm.training or norm.running_mean is None


def track_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves its running statistics towards mean (C,) and biased variance (C,), without gradient, of `count` values."""
    if not norm.training or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    share = 1.0 / norm.num_batches_tracked.to(mean) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(var.to(norm.running_var.dtype) * (count / (count - 1)), share)
