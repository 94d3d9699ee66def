"""Generalized convolution as a layer (Bootstrapping ViTs, Eq. 3-4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastib.ops import generalized_conv

__all__ = ["GeneralizedConv2d"]


class GeneralizedConv2d(nn.Module):
    """A convolution of num_heads taps, each the product of a head's value and output weights.

    See `fastib.ops.generalized_conv` for the taps. dim: channels of input and output. num_heads: divides dim. bias:
    whether the output has one. backend: of `fastib.ops.generalized_conv`.
    Parameters: w_v (dim, dim) and w_o (dim, dim), Xavier-uniform; bias (dim,), zero, or None.
    ValueError where dim is no multiple of num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int, bias: bool = True, backend: str | None = None, device: Any = None,
        dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"GeneralizedConv2d: dim must be a multiple of num_heads={num_heads}, got {dim}")
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        self.w_v = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.w_o = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws both weights Xavier-uniform; the bias is 0."""
        nn.init.xavier_uniform_(self.w_v)
        nn.init.xavier_uniform_(self.w_o)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, dim, rows, columns); the result has the same size, and is channels_last where x is."""
        return generalized_conv(x, self.w_v, self.w_o, self.bias, self.num_heads, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, bias={self.bias is not None}"
