"""Multi-head convolutional attention in plain PyTorch: the definition that every kernel is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastib.reference.philox import draw_seed, keep_factor, keep_mask

ATTN_STREAM = 0
RPE_STREAM = 1


def position_term(alpha: Tensor, center: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int = 1) -> Tensor:
    """b_hij = -alpha_h (|d|^2 - 2 center_h . d), d = pos(j) - pos(i), 0 on prefix tokens (DearKD, Eq. 2); (H, N, N).

    alpha: (H,). center: (H, 2), (row, column) in patches.
    """
    grid_h, grid_w = grid_size
    token = torch.arange(grid_h * grid_w, device=alpha.device)
    rows, columns = token // max(grid_w, 1), token % max(grid_w, 1)
    d_row = (rows[None, :] - rows[:, None]).to(alpha.dtype)
    d_column = (columns[None, :] - columns[:, None]).to(alpha.dtype)
    toward = center[:, 0, None, None] * d_row + center[:, 1, None, None] * d_column
    bias = -alpha[:, None, None] * (d_row.square() + d_column.square() - 2 * toward)
    return F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0))


def mhca_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    center: Tensor,
    grid_size: int | tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    rpe_dropout: float = 0.0,
    attn_dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + dropout(b)) v, with attention dropout, for tokens on a grid (DearKD, Eq. 2-3).

    q, k, v, result: (B, H, N, D), N = num_prefix_tokens + grid_h * grid_w. alpha: (H,). center: (H, 2), (row, column).
    seed: int or one-element int64 tensor; drawn from torch's generator where it is None and a probability is above 0.
    The position term and the softmax are float32 (float64 for float64 inputs). Checks nothing.
    """
    batch, heads, tokens, head_dim = q.shape
    grid_size = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
    scale = max(head_dim, 1) ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    if seed is None and (rpe_dropout > 0 or attn_dropout > 0):
        seed = draw_seed(q.device)

    bias = position_term(alpha.to(wide), center.to(wide), grid_size, num_prefix_tokens)
    if rpe_dropout > 0:
        keep = keep_mask(seed, (heads, tokens, tokens), rpe_dropout, RPE_STREAM, q.device)
        bias = torch.where(keep, bias * keep_factor(rpe_dropout), 0.0)
    attn = ((q * scale) @ k.transpose(-2, -1) + bias).softmax(dim=-1)
    if attn_dropout > 0:
        keep = keep_mask(seed, (batch, heads, tokens, tokens), attn_dropout, ATTN_STREAM, q.device)
        attn = torch.where(keep, attn * keep_factor(attn_dropout), 0.0)
    return attn.to(v.dtype) @ v
