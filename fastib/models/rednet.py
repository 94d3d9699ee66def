"""RedNet: a ResNet whose 3 x 3 convolutions are involutions (Li et al. 2021), the involution teacher of Co-advise."""

import re
from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers import DropPath, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F

from fastib.nn import Involution2d

__all__ = ["RedNet", "checkpoint_filter_fn", "convert_published_rednet", "rednet_stem"]

EXPANSION = 4


def rednet_stem(
    in_chans: int = 3, width: int = 64, kernel_size: int = 3, stride: int = 2, device=None, dtype=None
) -> nn.Sequential:
    """3x3 convolution of that stride, involution, 3x3 convolution, each with BatchNorm and ReLU.

    (B, in_chans, H, W) -> (B, width, ceil(H / stride), ceil(W / stride)); `kernel_size` is that of the involution.
    """
    dd, half = {"device": device, "dtype": dtype}, width // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_chans, half, 3, stride, padding=1, bias=False, **dd),
            norm1=nn.BatchNorm2d(half, **dd),
            act1=nn.ReLU(),
            inv=Involution2d(half, kernel_size, **dd),
            norm2=nn.BatchNorm2d(half, **dd),
            act2=nn.ReLU(),
            conv2=nn.Conv2d(half, width, 3, padding=1, bias=False, **dd),
            norm3=nn.BatchNorm2d(width, **dd),
            act3=nn.ReLU(),
        )
    )


class Bottleneck(nn.Module):
    """1x1 convolution, involution (which has the stride), 1x1 convolution to 4 * width channels, around a shortcut.

    (B, in_chans, H, W) -> (B, 4 * width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_chans: int, width: int, kernel_size: int, stride: int, dilation: int, drop_path: float, device, dtype
    ):
        super().__init__()
        dd, out_chans = {"device": device, "dtype": dtype}, EXPANSION * width
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(width, **dd)
        self.inv = Involution2d(width, kernel_size, stride, dilation, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, out_chans, 1, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(out_chans, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample = None
        if stride > 1 or in_chans != out_chans:
            shortcut = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False, **dd)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_chans, **dd))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.inv(y)))
        return F.relu(shortcut + self.drop_path(self.norm3(self.conv2(y))))


class RedNet(nn.Module):
    """Involution stem, max pooling, stages of bottlenecks, average pooling and a linear head.

    `feature_info` has one entry for the stem and one per stage; `features_only` takes them by index.

    Args:
        layers: bottlenecks of each stage; every stage but the first halves the resolution.
        in_chans: channels of the image.
        num_classes: classes of the head; 0 leaves the pooled features.
        widths: channels of the involutions of each stage, a quarter of the stage's own.
        kernel_size: of the involutions of the stages.
        stem_kernel_size: of the stem's involution: 3 to classify, 7 in the paper's detectors and segmenters.
        stem_width: channels of the stem.
        stem_stride: 2, or 1 for small images.
        stem_pool: 3x3 max pooling with stride 2 behind the stem.
        output_stride: largest reduction; later stages are dilated in place of their strides. None: no limit.
        global_pool: of timm's SelectAdaptivePool2d; "" leaves the map.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: no stage, or one width too many or too few, or a width that is no multiple of 16 above 16.
    """

    def __init__(
        self, layers: Sequence[int] = (3, 4, 6, 3), in_chans: int = 3, num_classes: int = 1000,
        widths: Sequence[int] = (64, 128, 256, 512), kernel_size: int = 7, stem_kernel_size: int = 3,
        stem_width: int = 64, stem_stride: int = 2, stem_pool: bool = True, output_stride: int | None = None,
        global_pool: str = "avg", drop_rate: float = 0.0, drop_path_rate: float = 0.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if not layers or len(layers) != len(widths):
            raise ValueError(f"layers: expected one per width ({len(widths)}), got {len(layers)}")
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem = rednet_stem(in_chans, stem_width, stem_kernel_size, stem_stride, **dd)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if stem_pool else nn.Identity()
        self.feature_info = [{"module": "stem", "num_chs": stem_width, "reduction": stem_stride}]
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(layers), device="cpu").tolist())
        reduction, dilation, before, stages = stem_stride * (2 if stem_pool else 1), 1, stem_width, []
        for i, (depth, width) in enumerate(zip(layers, widths, strict=True)):
            stride, first_dilation = 1 if i == 0 else 2, dilation
            if output_stride is not None and reduction * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reduction *= stride
            stage = []
            for j in range(depth):
                place = (stride, first_dilation) if j == 0 else (1, dilation)
                stage.append(Bottleneck(before, width, kernel_size, *place, next(drop_paths), **dd))
                before = EXPANSION * width
            stages.append(nn.Sequential(*stage))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": before, "reduction": reduction})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = before
        self._head(num_classes, global_pool, **dd)
        self.init_weights()

    def _head(self, num_classes: int, global_pool: str, device, dtype) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Kaiming (fan out) for convolutions, N(0, 0.01) for the head; each block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by stage or block, for layer-wise learning rate decay."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head on the device and in the dtype of the weights."""
        self.num_classes = num_classes
        weight = self.stem.conv1.weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._head(num_classes, pool, weight.device, weight.dtype)

    def _stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Outputs of the stem (0) and the stages (1, ...) `indices`, and the last map; see timm for the arguments."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(1 + len(self.stages), indices)
        x = self.stem(x)
        intermediates = [x] if 0 in take else []
        if not (stop_early and last == 0):
            x = self.pool(x)
        for i, stage in enumerate(self.stages[:last] if stop_early else self.stages):
            x = self._stage(stage, x)
            if i + 1 in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head, which no longer fits."""
        take, last = feature_take_indices(1 + len(self.stages), indices)
        pruned = last < len(self.stages)
        self.stages = self.stages[:last]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, ceil(H / 32), ceil(W / 32)) with the default strides."""
        x = self.pool(self.stem(x))
        for stage in self.stages:
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout and classify the map of `forward_features`."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


_INVOLUTION = {"conv1.conv": "reduce", "conv1.bn": "norm", "conv2.conv": "span"}
_STEM = {f"1.{old}": f"inv.{new}" for old, new in _INVOLUTION.items()}
_STEM |= {"0.conv": "conv1", "0.bn": "norm1", "2": "norm2", "4.conv": "conv2", "4.bn": "norm3"}
_BLOCK = {f"conv2.{old}": f"inv.{new}" for old, new in _INVOLUTION.items()}
_BLOCK |= {"conv1": "conv1", "bn1": "norm1", "bn2": "norm2", "conv3": "conv2", "bn3": "norm3"}
_BLOCK |= {"downsample.0": "downsample.0", "downsample.1": "downsample.1"}


def convert_published_rednet(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published RedNet with the names of `RedNet`.

    The published checkpoints (d-li14/involution, for MMClassification; the backbones of its detectors and segmenters
    too) have keys such as ``backbone.layer1.0.conv2.conv1.bn.weight`` and ``head.fc.weight``, with or without
    ``backbone.``, below a key ``state_dict`` or not. Their stages 1 to 4 become ``stages.0`` to ``3``, a block's second
    convolution is its involution. Values are not changed: both order the generated kernels by group, row, column.

    They are pickled, which fastib never loads; convert one where it came from can be trusted:
    ``save_file(convert_published_rednet(torch.load(path, weights_only=True)), "rednet50.safetensors")``, and then
    ``timm:rednet50@rednet50.safetensors`` names it as a teacher.

    Raises:
        ValueError: a key that no published RedNet has.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    return {_convert_key(key): value for key, value in state_dict.items()}


def _convert_key(key: str) -> str:
    path, _, tensor = key.removeprefix("backbone.").rpartition(".")
    if path == "head.fc":
        return f"fc.{tensor}"
    place, _, layer = path.partition(".")
    if place == "stem" and layer in _STEM:
        return f"stem.{_STEM[layer]}.{tensor}"
    block, _, layer = layer.partition(".")
    if re.fullmatch(r"layer[1-9]", place) and block.isdigit() and layer in _BLOCK:
        return f"stages.{int(place[5:]) - 1}.{block}.{_BLOCK[layer]}.{tensor}"
    raise ValueError(f"state_dict: expected keys of a published RedNet, got {key!r}")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under our names as they are; those of a published checkpoint converted."""
    state_dict = state_dict.get("state_dict", state_dict)
    return state_dict if any(key.startswith("stages.") for key in state_dict) else convert_published_rednet(state_dict)


def _cfg(**kwargs) -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1",
        "classifier": "fc",
        **kwargs,
    }


LAYERS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
DIGITS = {"num_classes": 10, "input_size": (1, 8, 8), "pool_size": None, "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs({**{f"rednet{depth}": _cfg() for depth in LAYERS}, "digits_inn": _cfg(**DIGITS)})


def _create(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> RedNet:
    options = {**defaults, **kwargs}
    features = kwargs.get("out_indices") or tuple(range(1 + len(options["layers"])))
    return build_model_with_cfg(
        RedNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": features, "feature_cls": "getter"},
        **options,
    )


@register_model
def rednet26(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-26: 1, 2, 4 and 1 bottlenecks; CiT-Ti's involution teacher."""
    return _create("rednet26", pretrained, {"layers": LAYERS[26]}, kwargs)


@register_model
def rednet38(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-38: 2, 3, 5 and 2 bottlenecks."""
    return _create("rednet38", pretrained, {"layers": LAYERS[38]}, kwargs)


@register_model
def rednet50(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-50: 3, 4, 6 and 3 bottlenecks."""
    return _create("rednet50", pretrained, {"layers": LAYERS[50]}, kwargs)


@register_model
def rednet101(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-101: 3, 4, 23 and 3 bottlenecks; CiT-S's involution teacher."""
    return _create("rednet101", pretrained, {"layers": LAYERS[101]}, kwargs)


@register_model
def rednet152(pretrained: bool = False, **kwargs) -> RedNet:
    """RedNet-152: 3, 8, 36 and 3 bottlenecks."""
    return _create("rednet152", pretrained, {"layers": LAYERS[152]}, kwargs)


@register_model
def digits_inn(pretrained: bool = False, **kwargs) -> RedNet:
    """A RedNet for images of 8 to 64 pixels: a stem that keeps the resolution, three stages of one bottleneck."""
    small = {"layers": (1, 1, 1), "widths": (16, 32, 64), "kernel_size": 3, "stem_width": 32, "stem_stride": 1}
    return _create("digits_inn", pretrained, {**small, "stem_pool": False}, kwargs)
