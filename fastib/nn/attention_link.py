"""Attention links as a module (AAL, Eq. 4-5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastib.ops import attention_link_loss, augment_attention

__all__ = ["AttentionLink"]


class AttentionLink(nn.Module):
    """Combines M attention maps into C maps, one for each map of a teacher: a 1x1 convolution (AAL, Eq. 4).

    in_maps: M, attention maps of the student. out_maps: C, maps of the teacher. mask: (C, M) bool, the links kept; all
    where None. backend: of `fastib.ops.attention_link_loss`.
    Parameters: weight (C, M), bias (C,), drawn as nn.Conv2d draws them. Buffer: mask, where there is one.
    ValueError for a count below 1 and a mask of another shape or dtype.
    """

    def __init__(
        self, in_maps: int, out_maps: int, mask: Tensor | None = None, backend: str | None = None,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        for name, count in {"in_maps": in_maps, "out_maps": out_maps}.items():
            if count < 1:
                raise ValueError(f"AttentionLink: {name} must be at least 1, got {count}")
        if mask is not None and (mask.shape != (out_maps, in_maps) or mask.dtype != torch.bool):
            raise ValueError(
                f"AttentionLink: mask must be bool of shape {(out_maps, in_maps)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        self.in_maps, self.out_maps, self.backend = in_maps, out_maps, backend
        self.weight = nn.Parameter(torch.empty(out_maps, in_maps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_maps, device=device, dtype=dtype))
        self.register_buffer("mask", None if mask is None else mask.to(self.weight.device, copy=True))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = self.in_maps**-0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, attn: Tensor) -> Tensor:
        """The augmented maps (B, C, S) of attention maps (B, M, S)."""
        return augment_attention(attn, self.weight, self.bias, mask=self.mask)

    def loss(self, attn: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Eq. 5 for attn (B, M, S) and the teacher's maps (B, C, S), see `fastib.ops.attention_link_loss`."""
        return attention_link_loss(
            attn, self.weight, self.bias, target, mask=self.mask, reduction=reduction, backend=self.backend
        )

    def extra_repr(self) -> str:
        links = "" if self.mask is None else f", links={int(self.mask.sum())}"
        return f"{self.in_maps}, {self.out_maps}{links}"
