"""Generalized convolution in plain PyTorch: the definition that its kernels are measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def taps(num_heads: int) -> list[tuple[int, int]]:
    """(row, column) offset of each head's tap: the first places of a window of ceil(sqrt(heads)) squared, row-major.

    The window's centre is at (k - 1) // 2, so an even window reaches one place further below and to the right.
    """
    window = math.isqrt(num_heads - 1) + 1
    centre = (window - 1) // 2
    return [(head // window - centre, head % window - centre) for head in range(num_heads)]


def generalized_conv_shift_ref(x: Tensor, num_heads: int, inverse: bool = False) -> Tensor:
    """Channels of head h moved: out[b, c, i, j] = x[b, c, i + row_h, j + column_h], zero outside.

    x: (B, C, rows, columns), C a multiple of num_heads. inverse: the other way, which is the gradient. Checks nothing.
    """
    rows, columns = x.shape[2:]
    offsets = [(-row, -column) if inverse else (row, column) for row, column in taps(num_heads)]
    reach = max(abs(offset) for tap in offsets for offset in tap)
    padded = F.pad(x, (reach,) * 4)
    parts = padded.unflatten(1, (num_heads, x.shape[1] // num_heads)).unbind(1)
    shifted = (
        part[:, :, reach + row : reach + row + rows, reach + column : reach + column + columns]
        for part, (row, column) in zip(parts, offsets, strict=True)
    )
    return torch.cat(list(shifted), 1)


def generalized_conv_ref(x: Tensor, w_v: Tensor, w_o: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """bias + sum_h w_o[:, head h] shift_h(w_v[head h] x) (Bootstrapping ViTs, Eq. 3-4).

    x: (B, C, rows, columns). w_v: (M, C), M a multiple of num_heads. w_o: (O, M). bias: (O,) or None. Result:
    (B, O, rows, columns). Checks nothing.
    """
    size = x.shape[2:]
    values = (w_v @ x.flatten(2)).unflatten(2, size)
    out = (w_o @ generalized_conv_shift_ref(values, num_heads).flatten(2)).unflatten(2, size)
    return out if bias is None else out + bias[:, None, None]


def materialized_kernel(w_v: Tensor, w_o: Tensor, num_heads: int) -> Tensor:
    """The same convolution's dense kernel (O, C, k, k) for `conv2d` with the window's padding; k^2 - H taps are 0.

    w_v: (M, C). w_o: (O, M). An even window needs one more row and column of padding below and to the right.
    """
    window = math.isqrt(num_heads - 1) + 1
    per_head = torch.einsum("ohd,hdc->och", w_o.unflatten(1, (num_heads, -1)), w_v.unflatten(0, (num_heads, -1)))
    return F.pad(per_head, (0, window**2 - num_heads)).unflatten(2, (window, window))
