"""Dynamic aggregation feed-forward as a module (DHVT, Sec. 3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastib.nn.grid import patch_grid

__all__ = ["DAFF"]


class DAFF(nn.Module):
    """An MLP with a depth-wise convolution for the patches, which weigh the class token's channels (DHVT, Eq. 4-5).

    Patches: s = GELU(norm1(conv1 x)), z = GELU(norm2(conv2 s)) + s, y = norm3(conv3 z), where conv1 and conv3 are 1 x 1
    and conv2 is a depth-wise 3 x 3 on the grid; norms are BatchNorm. Class token: its own input times
    expand(GELU(reduce(mean of y over the patches))), without a sigmoid; the convolutions do not see it.

    dim: channels of input and output. hidden_dim: channels inside, 4 dim where None. grid_size: patches (grid_h,
    grid_w), may be reassigned. reduction: of the channels between reduce and expand.
    `nn.SyncBatchNorm.convert_sync_batchnorm` makes its norms synchronised ones.
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, grid_size: int | tuple[int, int] = (14, 14), reduction: int = 4,
        device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        squeezed = dim // reduction if reduction > 0 else 0
        for name, value in {"dim": dim, "hidden_dim": hidden_dim, "dim // reduction": squeezed}.items():
            if value < 1:
                raise ValueError(f"DAFF: {name} must be 1 or more, got {value}")
        factory = {"device": device, "dtype": dtype}
        self.grid_size = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1, **factory)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **factory)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **factory)
        self.norm2 = nn.BatchNorm2d(hidden_dim, **factory)
        self.conv3 = nn.Conv2d(hidden_dim, dim, 1, **factory)
        self.norm3 = nn.BatchNorm2d(dim, **factory)
        self.reduce = nn.Linear(dim, squeezed, **factory)
        self.expand = nn.Linear(squeezed, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x, result: (B, 1 + grid_h grid_w, dim), the class token first. ValueError where x does not fill the grid.

        Where it fills another square, as for an image of another size, a square grid_size gives way to it.
        """
        grid = patch_grid("DAFF", self.grid_size, x.shape[1], 1)
        cls, patches = x[:, 0], x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
        s = F.gelu(self.norm1(self.conv1(patches)))
        y = self.norm3(self.conv3(F.gelu(self.norm2(self.conv2(s))) + s))
        weight = self.expand(F.gelu(self.reduce(y.mean(dim=(2, 3)))))
        return torch.cat(((cls * weight).unsqueeze(1), y.flatten(2).transpose(1, 2)), dim=1)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"
