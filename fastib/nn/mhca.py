"""Multi-head convolutional attention as a module (DearKD, Sec. 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastib.nn.grid import patch_grid
from fastib.nn.plain import apply_linear
from fastib.ops import mhca_attention

__all__ = ["MHCA"]


class MHCA(nn.Module):
    """Self-attention of patches on a grid that starts local and learns how far to look (DearKD, Eq. 2-3).

    The position term starts as ConViT's convolution: with k = floor(sqrt(num_heads)), head `row * k + column` has its
    center at (row, column) - (k - 1) / 2 patches, so an odd k tiles the k x k window around a patch and an even k sits
    on half offsets around it, and alpha = locality_strength. The heads beyond the k * k share center 0 and
    alpha = locality_strength / k^2: a Gaussian k times as wide, which spans the window that the others divide.

    dim: channels. grid_size: patches (grid_h, grid_w), may be reassigned. num_prefix_tokens: tokens before the patches.
    rpe_drop: dropout of the position term; DearKD does not state its rate. backend: of `fastib.ops.mhca_attention`.
        In float32 on the CPU qkv and proj, too, are products of our own, but with "reference", and where they were
        replaced, pruned or have hooks.
    Parameters: qkv and proj as in timm's Attention, alpha (num_heads,), center (num_heads, 2); the last two want no
    weight decay. ValueError where dim is not a multiple of num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, grid_size: int | tuple[int, int] = (14, 14), num_prefix_tokens: int = 1,
        qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0, rpe_drop: float = 0.1,
        locality_strength: float = 1.0, backend: str | None = None, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"MHCA: dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        factory = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.grid_size = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.locality_strength = locality_strength
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm, self.k_norm, self.norm, self.gate = nn.Identity(), nn.Identity(), nn.Identity(), None
        self.alpha = nn.Parameter(torch.empty(num_heads, **factory))
        self.center = nn.Parameter(torch.empty(num_heads, 2, **factory))
        self.rpe_drop, self.attn_drop = nn.Dropout(rpe_drop), nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_position()

    @torch.no_grad()
    def reset_position(self) -> None:
        """Puts alpha and center where the class says they start."""
        side = math.isqrt(self.num_heads)
        window = side * side
        head = torch.arange(window, dtype=self.center.dtype, device=self.center.device)
        places = torch.stack((head.div(side, rounding_mode="floor"), head % side), dim=1) - (side - 1) / 2
        self.alpha.fill_(self.locality_strength / window)[:window] = self.locality_strength
        self.center.zero_()[:window] = places

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x, result: (B, N, dim). ValueError for a mask, and where the N tokens do not fill the grid.

        Where N fits another square, as for an image of another size, a square grid_size gives way to it.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("MHCA: attn_mask must be None and is_causal False; masks are not supported")
        batch, tokens, _ = x.shape
        qkv = apply_linear(self.qkv, x, self.backend).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = mhca_attention(
            self.q_norm(q), self.k_norm(k), v, self.alpha, self.center,
            patch_grid("MHCA", self.grid_size, tokens, self.num_prefix_tokens),
            num_prefix_tokens=self.num_prefix_tokens, scale=self.scale, backend=self.backend,
            rpe_dropout=self.rpe_drop.p if self.rpe_drop.training else 0.0,
            attn_dropout=self.attn_drop.p if self.attn_drop.training else 0.0,
        )  # fmt: skip
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(apply_linear(self.proj, out, self.backend))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}, num_prefix_tokens={self.num_prefix_tokens}"
