"""Dynamic aggregation feed-forward as a module (DHVT, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastib.nn.batch_norm import takes_statistics, track_statistics
from fastib.nn.grid import patch_grid
from fastib.nn.plain import has_hooks
from fastib.ops import depthwise_block
from fastib.ops.linear import has_own_products, linear

__all__ = ["DAFF"]


class DAFF(nn.Module):
    """An MLP with a depth-wise convolution for the patches, which weigh the class token's channels (DHVT, Eq. 4-5).

    Patches: s = GELU(norm1(conv1 x)), z = GELU(norm2(conv2 s)) + s, y = norm3(conv3 z), where conv1 and conv3 are 1 x 1
    and conv2 is a depth-wise 3 x 3 on the grid; norms are BatchNorm. Class token: its own input times
    expand(GELU(reduce(mean of y over the patches))), without a sigmoid; the convolutions do not see it.

    dim: channels of input and output. hidden_dim: channels inside, 4 dim where None. grid_size: patches (grid_h,
    grid_w), may be reassigned. reduction: of the channels between reduce and expand.
    backend: of `fastib.ops.depthwise_block`, which computes all between conv1 and conv3 in passes that store nothing,
        unless one of these layers was replaced, pruned or has hooks: then they run one by one. conv1 and conv3 are
        products of our own in float32 on the CPU, PyTorch's elsewhere and with "reference".
    `nn.SyncBatchNorm.convert_sync_batchnorm` makes its norms synchronised ones; they run layer by layer.
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, grid_size: int | tuple[int, int] = (14, 14), reduction: int = 4,
        backend: str | None = None, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        squeezed = dim // reduction if reduction > 0 else 0
        for name, value in {"dim": dim, "hidden_dim": hidden_dim, "dim // reduction": squeezed}.items():
            if value < 1:
                raise ValueError(f"DAFF: {name} must be 1 or more, got {value}")
        factory = {"device": device, "dtype": dtype}
        self.grid_size = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
        self.backend = backend
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
        cls, patches = x.split((1, x.shape[1] - 1), dim=1)
        hidden = self._pointwise(self.conv1, patches, grid)
        mixed = self._fused(hidden, grid) if self._can_fuse(hidden) else self._layers(hidden, grid)
        y = _on_grid(self.norm3, self._pointwise(self.conv3, mixed, grid), grid)
        weight = self.expand(F.gelu(self.reduce(y.mean(dim=1))))
        return torch.cat((cls * weight.unsqueeze(1), y), dim=1)

    def _pointwise(self, conv: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.backend in (None, "cpu") and _is_pointwise(conv):
            inputs = x, conv.weight.flatten(1), conv.bias
            if has_own_products(*inputs):
                return linear(*inputs)
        return _on_grid(conv, x, grid)

    def _can_fuse(self, hidden: Tensor) -> bool:
        """Plain layers as they are built, without hooks, and the norms in one mode.

        Synchronised norms need all processes between the passes.
        """
        norms, (batch, places, channels) = (self.norm1, self.norm2), hidden.shape
        plain = all(type(norm) is nn.BatchNorm2d and norm.affine for norm in norms)
        plain = plain and _is_depthwise(self.conv2, channels) and not any(map(has_hooks, (*norms, self.conv2)))
        return plain and len({takes_statistics(norm) for norm in norms}) == 1 and batch * places > 1

    def _fused(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        norm1, norm2 = self.norm1, self.norm2
        statistics = None
        if not takes_statistics(norm1):
            running = norm1.running_mean, norm1.running_var, norm2.running_mean, norm2.running_var
            statistics = torch.stack(running)
        out, used = depthwise_block(
            hidden, norm1.weight, norm1.bias, self.conv2.weight, self.conv2.bias, norm2.weight, norm2.bias, grid,
            statistics=statistics, eps=(norm1.eps, norm2.eps), backend=self.backend,
        )  # fmt: skip
        count = hidden.shape[0] * hidden.shape[1]
        track_statistics(norm1, used[0], used[1], count)
        track_statistics(norm2, used[2], used[3], count)
        return out

    def _layers(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        s = F.gelu(_on_grid(self.norm1, hidden, grid))
        return F.gelu(_on_grid(lambda maps: self.norm2(self.conv2(maps)), s, grid)) + s

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}"


def _is_depthwise(conv: nn.Module, channels: int) -> bool:
    """Whether it is the convolution that DAFF builds."""
    if type(conv) is not nn.Conv2d or conv.bias is None or conv.padding_mode != "zeros":
        return False
    sizes = conv.kernel_size, conv.padding, conv.stride, conv.dilation
    return sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == conv.in_channels == channels


def _is_pointwise(conv: nn.Module) -> bool:
    """Whether it is a 1 x 1 convolution as DAFF builds them, without hooks."""
    if type(conv) is not nn.Conv2d or has_hooks(conv):
        return False
    return (conv.kernel_size, conv.padding, conv.stride, conv.groups) == ((1, 1), (0, 0), (1, 1), 1)


def _on_grid(layer: Callable[[Tensor], Tensor], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`layer`, for maps (B, C, gh, gw), on places x (B, gh gw, C): channels_last, and so without a copy."""
    return layer(x.unflatten(1, grid).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
