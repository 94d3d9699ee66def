"""Attention links in plain PyTorch: the definition that their kernels are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment_attention_ref(attn: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """weight attn + bias, links where `mask` is False left out (AAL, Eq. 4): (B, C, S).

    attn: (B, M, S). weight: (C, M). bias: (C,). mask: (C, M) bool or None. Where attn is 16-bit the weight is rounded
    to its dtype, as autocast does; sums are float32 (float64 for float64), and so is the result. Checks nothing.
    """
    wide = torch.promote_types(attn.dtype, torch.float32)
    if mask is not None:
        weight = weight.masked_fill(~mask, 0.0)
    return weight.to(attn.dtype).to(wide) @ attn.to(wide) + bias.to(wide)[:, None]


def attention_link_loss_ref(
    attn: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """Squared distance of augmented maps and teacher maps, both unit vectors over positions (AAL, Eq. 5).

    attn, weight, bias, mask: as for `augment_attention_ref`. target: (B, C, S). reduction: "mean" or "sum" over
    (B, C, S), or "none" for the (B, C) sums over S. A norm counts as at least `eps`. Checks nothing.
    """
    augmented = augment_attention_ref(attn, weight, bias, mask)
    distance = F.normalize(augmented, dim=2, eps=eps) - F.normalize(target.to(augmented.dtype), dim=2, eps=eps)
    loss = distance.square().sum(2)
    if reduction == "none":
        return loss
    return loss.sum() / target.numel() if reduction == "mean" else loss.sum()
