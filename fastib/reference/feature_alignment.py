"""Feature alignment in plain PyTorch: the definition that its kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled_unit_tokens(x: Tensor, tokens: int, center: bool, eps: float) -> Tensor:
    """x (B, N, C) averaged along its tokens to `tokens` of them, each centred over C and brought to length 1.

    As `layer_norm` does, eps is added to the mean square: |x| counts as sqrt(|x|^2 + C eps). float32, or float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    if x.shape[1] != tokens:
        x = x.unflatten(1, (tokens, x.shape[1] // tokens)).mean(2)
    if center:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().sum(-1, keepdim=True) + x.shape[-1] * eps).sqrt()


def feature_alignment_loss_ref(
    student: Tensor, teacher: Tensor, *, center: bool = True, eps: float = 1e-5, reduction: str = "mean"
) -> Tensor:
    """Squared distance of unit tokens, the longer sequence averaged to the shorter (Bootstrapping ViTs, Eq. 6).

    student: (B, N, C). teacher: (B, M, C); the shorter length divides the longer. reduction: "mean" or "sum" over the
    (B, min(N, M)) tokens, or "none". Checks nothing.
    """
    tokens = min(student.shape[1], teacher.shape[1])
    distance = pooled_unit_tokens(student, tokens, center, eps) - pooled_unit_tokens(teacher, tokens, center, eps)
    loss = distance.square().sum(-1)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
