"""The middle of DHVT's feed-forward in plain PyTorch: the definition that its kernels are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of x (B, P, C); those of nothing are 0 and 0."""
    wide = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return wide.mean(0), wide.var(0, unbiased=False)


def depthwise_block_ref(
    x: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    grid_size: int | tuple[int, int],
    *,
    statistics: Tensor | None = None,
    eps: tuple[float, float] = (1e-5, 1e-5),
) -> tuple[Tensor, Tensor]:
    """s = GELU(norm1(x)); GELU(norm2(conv(s))) + s, and the statistics (4, C) of both norms (DHVT, Sec. 3.2).

    x, result: (B, P, C), P = grid_h * grid_w. gamma, beta: (C,) of the two norms. weight: (C, 1, 3, 3), bias: (C,) of
    the depth-wise convolution, zero outside of the grid. statistics: mean1, var1, mean2, var2; those of x where None,
    with biased variances. Norms are float32 (float64 for float64), as are the statistics. Checks nothing.
    """
    grid_h, grid_w = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    batch, _, channels = x.shape
    used: list[Tensor] = []

    def norm(y: Tensor, gamma: Tensor, beta: Tensor, place: int) -> Tensor:
        mean, var = _moments(y) if statistics is None else (statistics[2 * place], statistics[2 * place + 1])
        used.extend((mean, var))
        return ((y - mean) * (var + eps[place]).rsqrt() * gamma + beta).to(x.dtype)

    s = F.gelu(norm(x, gamma1, beta1, 0))
    places = s.transpose(1, 2).reshape(batch, channels, grid_h, grid_w)
    if places.numel():
        conv = F.conv2d(places, weight.to(s.dtype), bias.to(s.dtype), padding=1, groups=channels)
    else:  # which conv2d refuses; weight and bias have a gradient of nothing
        conv = places + (weight.sum() + bias.sum()).to(s.dtype)
    out = F.gelu(norm(conv.flatten(2).transpose(1, 2), gamma2, beta2, 1)) + s
    return out, torch.stack(used).detach()
