"""Sequential overlapping patch embedding (DHVT, Sec. 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastib.nn.layout import channels_last

__all__ = ["SOPE", "ChannelAffine"]


class ChannelAffine(nn.Module):
    """alpha x + beta, per channel (DHVT, Eq. 1); alpha starts at 1, beta at 0. x: (B, channels, H, W).

    The parameters are (1, channels, 1, 1) as in the published code, where rules that spare one-dimensional parameters
    from weight decay do not spare these.
    """

    def __init__(self, channels: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, channels, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, channels, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, x, self.alpha)


class SOPE(nn.Module):
    """Patch tokens from log2(patch_size) 3 x 3 convolutions of stride 2, between two affine maps (DHVT, Eq. 1-3).

    Convolution i of k has embed_dim / 2^(k - i) outputs, no bias, and BatchNorm and GELU behind it. As in the published
    code the last one has no GELU, unless it is the only one; Eq. 2 has one there too. Images and maps are channels_last
    inside, which is faster and what the tokens are.

    patch_size: 2, 4, 8, ... embed_dim: a multiple of patch_size / 2.
    ValueError for another patch_size or embed_dim.
    """

    def __init__(
        self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 192, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f"SOPE: patch_size must be a power of 2 above 1, got {patch_size}")
        if embed_dim < 1 or embed_dim % (patch_size // 2):
            raise ValueError(f"SOPE: embed_dim must be a multiple of patch_size / 2, got {embed_dim} and {patch_size}")
        factory = {"device": device, "dtype": dtype}
        count = patch_size.bit_length() - 1
        widths = [in_chans, *(embed_dim >> (count - i) for i in range(1, count + 1))]
        self.pre, self.post = ChannelAffine(in_chans, **factory), ChannelAffine(embed_dim, **factory)
        self.stages = nn.Sequential()
        for i in range(count):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False, **factory)
            act = nn.GELU() if i + 1 < count or count == 1 else nn.Identity()
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(widths[i + 1], **factory), act))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W). Result: (B, gh, gw, embed_dim), gh = ceil(H / patch_size), and gw alike."""
        x = self.pre(channels_last(x))
        return self.post(self.stages(x)).permute(0, 2, 3, 1)
