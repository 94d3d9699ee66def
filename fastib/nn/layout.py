"""The layout that convolutions on tokens are fast in."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) in channels_last; as it is under the transforms of `torch.func`, where a layout has no meaning."""
    if torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)
