"""Involution in plain PyTorch, by unfolding: the definition that every kernel is measured against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def involution_ref(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1) -> Tensor:
    """y[b, c, i, j] = sum_uv weight[b, c // (C / G), u, v, i, j] x[b, c, i s + (u - K // 2) d, j s + (v - K // 2) d].

    x: (B, C, Hi, Wi), zero outside. weight: (B, G, K, K, Ho, Wo), K odd. Result: (B, C, Ho, Wo). Checks nothing.
    """
    batch, groups, kernel, _, rows, columns = weight.shape
    channels = x.shape[1]
    if 0 in (batch, channels, rows, columns):  # unfold refuses these
        return (x.sum() + weight.sum()) * x.new_zeros((batch, channels, rows, columns))
    padding = (kernel - 1) // 2 * dilation
    patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    patches = patches.reshape(batch, groups, channels // groups, kernel, kernel, rows, columns)
    return (weight[:, :, None] * patches).sum((3, 4)).reshape(batch, channels, rows, columns)
