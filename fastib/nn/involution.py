"""Involution as a layer: the kernel of every place is generated from the features there (Li et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastib.ops import involution

__all__ = ["Involution2d"]


class Involution2d(nn.Module):
    """Applies to each group of channels, at each place, a K x K kernel that two 1 x 1 convolutions make from that place.

    kernels = span(relu(norm(reduce(x)))), where x is first averaged over stride x stride cells; see
    `fastib.ops.involution`. The cells at the lower and right edge of an odd size are smaller, so any size will do.

    channels: of input and output. kernel_size: K, odd. group_channels: channels that share a kernel; where there are
    fewer channels than that, all of them share it. reduction: of the channels between the two convolutions.
    norm_layer, act_layer: between them; modules are made as `norm_layer(num_features)` and `act_layer()`.
    backend: of `fastib.ops.involution`.
    Parameters: reduce (C / reduction, C, 1, 1), norm, span (G K^2, C / reduction, 1, 1) with bias, whose output channels
    are ordered (group, row, column of the kernel).
    ValueError where channels is not a multiple of group_channels, kernel_size is even, or stride or dilation is below 1.
    """

    def __init__(
        self, channels: int, kernel_size: int = 7, stride: int = 1, dilation: int = 1, group_channels: int = 16,
        reduction: int = 4, norm_layer: Any = nn.BatchNorm2d, act_layer: Any = nn.ReLU, backend: str | None = None,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        group_channels = min(group_channels, channels)
        for name, value in {"channels": channels, "group_channels": group_channels, "reduction": reduction}.items():
            if value < 1:
                raise ValueError(f"Involution2d: {name} must be 1 or more, got {value}")
        if channels % group_channels:
            raise ValueError(
                f"Involution2d: channels must be a multiple of group_channels={group_channels}, got {channels}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"Involution2d: kernel_size must be odd and positive, got {kernel_size}")
        for name, value in {"stride": stride, "dilation": dilation}.items():
            if value < 1:
                raise ValueError(f"Involution2d: {name} must be 1 or more, got {value}")
        factory = {"device": device, "dtype": dtype}
        hidden = max(channels // reduction, 1)
        self.channels, self.kernel_size, self.groups = channels, kernel_size, channels // group_channels
        self.stride, self.dilation, self.backend = stride, dilation, backend
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False, **factory)
        self.norm, self.act = norm_layer(hidden, **factory), act_layer()
        self.span = nn.Conv2d(hidden, kernel_size**2 * self.groups, 1, **factory)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, G, K, K, Ho, Wo) that x makes, Ho = ceil(Hi / stride)."""
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)
        spanned = self.span(self.act(self.norm(self.reduce(x))))
        return spanned.unflatten(1, (self.groups, self.kernel_size, self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, Hi, Wi); result: (B, channels, ceil(Hi / stride), ceil(Wi / stride)), in x's memory format."""
        return involution(x, self.kernels(x), stride=self.stride, dilation=self.dilation, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"
