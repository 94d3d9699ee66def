"""Involution (Li et al. 2021): the public function."""

from __future__ import annotations

from torch import Tensor

from fastib.reference.involution import involution_ref


def involution(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, backend: str | None = None) -> Tensor:
    """A K x K kernel of its own for every place and group of channels; x (B, C, Hi, Wi), weight (B, G, K, K, Ho, Wo)."""
    return involution_ref(x, weight, stride=stride, dilation=dilation)
