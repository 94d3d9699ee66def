"""The class token's attention in plain PyTorch: the definition that its kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def cls_attention_maps_ref(
    q: Tensor,
    k: Tensor,
    *,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    over: str = "patches",
    bias: Tensor | None = None,
) -> Tensor:
    """softmax_j(scale q.k_j + bias_j) over the patches, or over all keys and then cut to them (AAL, Eq. 3).

    q: (B, H, D). k: (B, H, N, D), prefix tokens first. bias: broadcasts to (B, H, N), or None. Result:
    (B, H, N - num_prefix_tokens) in q's dtype; the softmax is float32 (float64 for float64). Checks nothing.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (k @ (q * scale).unsqueeze(-1)).squeeze(-1).to(wide)
    if bias is not None:
        scores = scores + bias
    if over == "patches":
        return scores[..., num_prefix_tokens:].softmax(-1).to(q.dtype)
    return scores.softmax(-1)[..., num_prefix_tokens:].to(q.dtype)
