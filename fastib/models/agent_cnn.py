"""Agent CNNs: a convolutional network built after a vision transformer (Bootstrapping ViTs, Sec. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastib.models.shared_weights import SharedWeights
from fastib.nn.layout import channels_last
from fastib.ops import generalized_conv

__all__ = ["AgentCNN", "agent_for", "describe_agent"]


class TapConv2d(nn.Module):
    """A convolution with the first `taps` places, row by row, of a window of ceil(sqrt(taps)) squared (Eq. 3).

    The taps are those of `fastib.ops.generalized_conv`; 9 of them are a 3 x 3 convolution with padding 1. Parameters:
    weight (dim, dim, taps), Xavier-uniform; bias (dim,), 0.
    """

    def __init__(self, dim: int, taps: int, device=None, dtype=None):
        super().__init__()
        self.window = math.isqrt(taps - 1) + 1
        self.rows = -(-taps // self.window)
        self.weight = nn.Parameter(torch.empty(dim, dim, taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, h, w) to the same size."""
        missing = self.rows * self.window - self.weight.shape[2]
        kernel = F.pad(self.weight, (0, missing)).unflatten(2, (self.rows, self.window))
        before = (self.window - 1) // 2
        after, below = self.window - 1 - before, self.rows - 1 - before
        if before == after == below:
            return F.conv2d(x, kernel, self.bias, padding=before)
        return F.conv2d(F.pad(x, (before, after, before, below)), kernel, self.bias)


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear: (..., dim) to the same size."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(*size, device=device, dtype=dtype) for size in ((dim, hidden), (hidden, dim)))
        self.drop = nn.Dropout(drop)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))


class Stem(nn.Sequential):
    """Image to map. form "base": the patch projection. form "res": convolution, BatchNorm, GELU, pooling, convolution.

    The map of "res" has twice the rows and columns that the patches have: a stride of patch_size / 2 in all, which is
    shared by convolution, pooling and convolution in this order where it is 8, 4, 2 or 1.
    """

    def __init__(self, form: str, in_chans: int, dim: int, patch_size: int, mid: int = 64, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if form == "base":
            self.conv1 = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
            return
        steps = {16: (2, 2, 2), 8: (2, 1, 2), 4: (2, 1, 1), 2: (1, 1, 1)}
        if patch_size not in steps:
            raise ValueError(f"patch_size: a res-like agent needs 2, 4, 8 or 16, got {patch_size}")
        first, pool, last = steps[patch_size]
        kernel = 7 if first == 2 else 3
        self.conv1 = nn.Conv2d(in_chans, mid, kernel, first, kernel // 2, bias=False, **dd)
        self.norm, self.act = nn.BatchNorm2d(mid, **dd), nn.GELU()
        if pool == 2:
            self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(mid, dim, 3, last, 1, **dd)
        nn.init.xavier_uniform_(self.conv1.weight)
        nn.init.xavier_uniform_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)


class AgentBlock(nn.Module):
    """x + norm(conv) and x + norm(mlp), the norm before (pre_norm) or after what it belongs to; (B, dim, h, w) is kept.

    weights, layer: where its convolution and MLP come from, if they are the transformer's own.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, pre_norm: bool, drop: float, proj_drop: float,
        weights: SharedWeights | None = None, layer: int = 0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.pre_norm, self.drop, self.layer = num_heads, pre_norm, drop, layer
        self.weights = weights
        self.norm1, self.norm2 = nn.BatchNorm2d(dim, **dd), nn.BatchNorm2d(dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        if weights is None:
            self.conv, self.mlp = TapConv2d(dim, num_heads, **dd), Mlp(dim, hidden, drop, **dd)

    def _conv(self, x: Tensor) -> Tensor:
        if self.weights is None:
            return self.conv(x)
        w_v, w_o, bias = (self.weights.read(self.layer, name) for name in ("w_v", "w_o", "b_o"))
        return generalized_conv(x, w_v, w_o, bias, self.num_heads)

    def _mlp(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.weights is None:
            x = self.mlp(x)
        else:
            w_1, b_1, w_2, b_2 = (self.weights.read(self.layer, name) for name in ("w_1", "b_1", "w_2", "b_2"))
            hidden = F.dropout(self.weights.act(self.layer)(F.linear(x, w_1, b_1)), self.drop, self.training)
            x = F.linear(hidden, w_2, b_2)
        return x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for part, norm in ((self._conv, self.norm1), (self._mlp, self.norm2)):
            x = x + self.proj_drop(part(norm(x)) if self.pre_norm else norm(part(x)))
        return x


class AgentCNN(nn.Module):
    """The agent of a transformer: CONV in place of attention, BatchNorm, an average over the map as class token.

    Args:
        in_chans, num_classes: channels of the image, classes of the head (0: none).
        dim, depth, num_heads, hidden, patch_size: the transformer's.
        form: "base" or "res", see `Stem`.
        pre_norm: whether norms come before convolution and MLP.
        down_sample: blocks (from 0) after which 2 x 2 places are averaged.
        drop_rate, proj_drop_rate: dropout inside the MLP, and of what is added to x.
        weights: `SharedWeights` of the transformer; None: convolutions with dense taps and MLPs of its own.
        global_pool: of timm's SelectAdaptivePool2d; "" leaves the map.
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, dim: int = 288, depth: int = 6, num_heads: int = 9,
        hidden: int = 1152, patch_size: int = 16, form: str = "res", pre_norm: bool = True,
        down_sample: Sequence[int] = (), drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
        weights: SharedWeights | None = None, global_pool: str = "avg", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if form not in ("base", "res"):
            raise ValueError(f"form: expected 'base' or 'res', got {form!r}")
        if not all(0 <= layer < depth for layer in down_sample):
            raise ValueError(f"down_sample: expected blocks in [0, {depth - 1}], got {tuple(down_sample)}")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dim
        self.down_sample, self.grad_checkpointing = tuple(down_sample), False
        self.stem = Stem(form, in_chans, dim, patch_size, **dd)
        self.blocks = nn.ModuleList(
            AgentBlock(dim, num_heads, hidden, pre_norm, drop_rate, proj_drop_rate, weights, layer, **dd)
            for layer in range(depth)
        )
        self.norm = nn.BatchNorm2d(dim, **dd)
        self._head(num_classes, global_pool, **dd)
        reduction = patch_size if form == "base" else patch_size // 2
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": reduction * 2 ** sum(j < i for j in down_sample)}
            for i in range(depth)
        ]

    def _head(self, num_classes: int, global_pool: str, device, dtype) -> None:
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by block, for layer-wise learning rate decay."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head on the device and in the dtype of the weights."""
        self.num_classes = num_classes
        weight = self.norm.weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._head(num_classes, pool, weight.device, weight.dtype)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Maps of the blocks `indices` (None: all) before they are made smaller, and the last map; as timm's models."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        intermediates: list[Tensor] = []
        x = self._maps(x, last + 1 if stop_early else len(self.blocks), take, intermediates)
        return intermediates if intermediates_only else (x, intermediates)

    def _maps(self, x: Tensor, blocks: int, take: Sequence[int], taken: list[Tensor]) -> Tensor:
        """The last map of the first `blocks` blocks; `taken` gets those of the blocks in `take`."""
        x = channels_last(self.stem(channels_last(x)))
        for i, block in enumerate(self.blocks[:blocks]):
            saves = self.grad_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
            if i in take:
                taken.append(x)
            if i in self.down_sample:
                if min(x.shape[2:]) < 2:
                    raise ValueError(
                        f"down_sample: block {i} leaves {x.shape[2]} x {x.shape[3]} places, too few to halve"
                    )
                x = F.avg_pool2d(x, 2)
        return x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, and the head."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, h, w), channels_last."""
        return self._maps(x, len(self.blocks), (), [])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """BatchNorm, GELU, average over the map and classes, of the map of `forward_features`."""
        x = self.global_pool(F.gelu(self.norm(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def describe_agent(
    vit: nn.Module, form: str = "res", pre_norm: bool = True, down_sample: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of the `AgentCNN` of a timm ViT whose attention has a packed qkv.

    form: "res" or "base". pre_norm: see `AgentCNN`. down_sample: None is nothing for "base", and for "res" the ends of
    the first and third quarter of the blocks, the paper's 2 and 8 of 12.
    ValueError where the model is no such ViT.
    """
    shared = SharedWeights(vit)
    embedding, depth = getattr(vit, "patch_embed", None), len(shared.blocks)
    patch = getattr(embedding, "proj", None)
    if not isinstance(patch, nn.Conv2d) or patch.kernel_size[0] != patch.kernel_size[1]:
        raise ValueError(f"vit: an agent needs square patches, and {type(vit).__name__} has none")
    if hasattr(embedding, "backbone"):
        raise ValueError(f"vit: an agent needs patches of the image, not of a map as in {type(embedding).__name__}")
    attn, mlp = shared.blocks[0].attn, shared.blocks[0].mlp
    if down_sample is None:
        down_sample = () if form == "base" or depth < 4 else (depth // 4 - 1, depth * 3 // 4 - 1)
    return {
        "in_chans": patch.in_channels, "num_classes": vit.num_classes, "dim": attn.proj.out_features, "depth": depth,
        "num_heads": attn.num_heads, "hidden": mlp.fc1.out_features, "patch_size": patch.kernel_size[0], "form": form,
        "pre_norm": pre_norm, "down_sample": tuple(down_sample), "drop_rate": mlp.drop1.p,
        "proj_drop_rate": attn.proj_drop.p,
    }  # fmt: skip


def agent_for(vit: nn.Module, shared: bool = False, **options: Any) -> AgentCNN:
    """The agent CNN of a timm ViT whose attention has a packed qkv.

    shared: its convolutions and MLPs are made of the ViT's own tensors, which its state dict then leaves out: per layer
        the value and output weights and the output's bias (the values' bias is not used) and the MLP; dropout is the
        ViT's. Else it has dense taps, dropout 0.1 inside its MLPs and none after them.
    options: of `describe_agent`, then of `AgentCNN`.
    ValueError where the model is no such ViT.
    """
    names = ("form", "pre_norm", "down_sample")
    described = describe_agent(vit, **{name: options.pop(name) for name in names if name in options})
    rates = {} if shared else {"drop_rate": 0.1, "proj_drop_rate": 0.0}
    weights = SharedWeights(vit) if shared else None
    weight = next(vit.parameters())
    agent = AgentCNN(**{**described, **rates, **options}, weights=weights, device=weight.device, dtype=weight.dtype)
    return agent.train(vit.training)
