"""Head-interacted self-attention as a module (DHVT, Sec. 3.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastib.nn.plain import apply_linear
from fastib.ops import head_token_attention

__all__ = ["HeadTokenAttention"]


class HeadTokenAttention(nn.Module):
    """Self-attention with one more token per head, made of that head's channels: HI-MHSA (DHVT, Eq. 6-7, Fig. 3).

    Head token t is GELU(LayerNorm(W mean_t + b)) + head_embed_t: mean_t is the mean of channel group t over all N
    tokens, class token included, W is shared by the heads, and the LayerNorm, which Eq. 6 leaves out and the published
    code has, runs over each group of head_dim channels. The head tokens stand behind the N tokens in plain
    self-attention over N + num_heads tokens; the mean of their projected outputs is added to the class token. They are
    projected to q, k and v by themselves and their outputs averaged before the projection, which is linear, so no
    tensor has N + num_heads rows.

    dim: channels, a multiple of num_heads. backend: of `fastib.ops.head_token_attention`. In float32 on the CPU qkv and
        proj, too, are products of our own, but with "reference", and where they were replaced, pruned or have hooks.
    Parameters: qkv and proj as in timm's Attention, head_proj (head_dim to dim), head_norm (head_dim), head_embed
    (1, num_heads, dim). ValueError where dim is not a multiple of num_heads.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, proj_bias: bool = True, attn_drop: float = 0.0,
        proj_drop: float = 0.0, backend: str | None = None, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"HeadTokenAttention: dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}"
            )
        factory = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.head_proj = nn.Linear(self.head_dim, dim, **factory)
        self.head_norm = nn.LayerNorm(self.head_dim, **factory)
        self.head_embed = nn.Parameter(torch.empty(1, num_heads, dim, **factory))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the head embedding from N(0, 0.02), truncated."""
        nn.init.trunc_normal_(self.head_embed, std=0.02)

    def head_tokens(self, x: Tensor) -> Tensor:
        """The head tokens (B, num_heads, dim) of x (B, N, dim)."""
        groups = x.mean(dim=1).unflatten(-1, (self.num_heads, self.head_dim))
        tokens = self.head_proj(groups).unflatten(-1, (self.num_heads, self.head_dim))
        return F.gelu(self.head_norm(tokens)).flatten(2) + self.head_embed

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x, result: (B, N, dim), the class token first. ValueError for a mask."""
        if attn_mask is not None or is_causal:
            raise ValueError("HeadTokenAttention: attn_mask must be None and is_causal False; masks are not supported")
        q, k, v = self._project(x)
        q_extra, k_extra, v_extra = self._project(self.head_tokens(x))
        out = head_token_attention(
            q, k, v, q_extra, k_extra, v_extra, scale=self.scale, backend=self.backend,
            attn_dropout=self.attn_drop.p if self.attn_drop.training else 0.0,
        )  # fmt: skip
        out = apply_linear(self.proj, out.transpose(1, 2).flatten(2), self.backend)
        if self.proj.bias is not None:  # the bias of the head tokens' projections, whose mean it is
            out = out.select_scatter((out[:, 0] + self.proj.bias).to(out.dtype), dim=1, index=0)
        return self.proj_drop(out)

    @torch.no_grad()
    def head_attention(self, x: Tensor) -> Tensor:
        """What each head token attends to, in each attention head: (B, num_heads, num_heads, N), token by head.

        x: (B, N, dim), the input of `forward`. Entry [b, t, h, n] is head token t's attention to token n in head h; the
        softmax runs over all N + num_heads tokens, of which the head tokens themselves are cut off.
        """
        tokens = self.head_tokens(x)
        _, k, _ = self._project(x)
        q_extra, k_extra, _ = self._project(tokens)
        keys = torch.cat((k, k_extra), dim=2)
        scores = (q_extra @ keys.transpose(-2, -1)) * self.scale  # (B, H, T, N + T)
        return scores.float().softmax(-1)[..., : x.shape[1]].transpose(1, 2)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = apply_linear(self.qkv, x, self.backend).unflatten(-1, (3, self.num_heads, self.head_dim))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
