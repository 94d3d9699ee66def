"""A small BatchNorm CNN: the teacher for images of 8 to 64 pixels."""

from collections.abc import Sequence

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["SmallCNN"]


class ConvNormAct(nn.Sequential):
    """3x3 convolution without bias, BatchNorm and, where `act` is true, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, act: bool = True, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        layers = [
            nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False, **dd),
            nn.BatchNorm2d(out_chans, **dd),
        ]
        super().__init__(*layers, *([nn.ReLU()] if act else []))


class ResidualBlock(nn.Module):
    """y = relu(x + bn(conv(relu(bn(conv(x)))))); shape (B, C, H, W) is kept."""

    def __init__(self, chans: int, device=None, dtype=None):
        super().__init__()
        self.conv1 = ConvNormAct(chans, chans, device=device, dtype=dtype)
        self.conv2 = ConvNormAct(chans, chans, act=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(self.conv1(x)))


class SmallCNN(nn.Module):
    """Stages of one (strided) convolution and `blocks` residual blocks each, then average pooling and a linear head.

    The first stage keeps the resolution, every later one halves it. `feature_info` has one entry per stage.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head; 0 leaves the pooled features.
        widths: channels of each stage.
        blocks: residual blocks of each stage.
        drop_rate: dropout before the head.
        global_pool: of timm's SelectAdaptivePool2d; "" leaves the map.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not widths:
            raise ValueError("widths: expected at least one stage, got none")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.grad_checkpointing = False
        stages, info = [], []
        for i, width in enumerate(widths):
            stride = 1 if i == 0 else 2
            previous = in_chans if i == 0 else widths[i - 1]
            body = [ResidualBlock(width, **dd) for _ in range(blocks)]
            stages.append(nn.Sequential(ConvNormAct(previous, width, stride, **dd), *body))
            info.append({"module": f"stages.{i}", "num_chs": width, "reduction": 2**i})
        self.stages = nn.Sequential(*stages)
        self.feature_info = info
        self.num_features = widths[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self._head(num_classes, global_pool, **dd)
        self.init_weights()

    def _head(self, num_classes: int, global_pool: str, device, dtype) -> None:
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Kaiming (fan out) for the convolutions, N(0, 0.01) for the head."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by stage, for layer-wise learning rate decay."""
        return {"stem": r"^stages\.0", "blocks": r"^stages\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head on the device and in the dtype of the weights."""
        self.num_classes = num_classes
        weight = self.stages[0][0][0].weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._head(num_classes, pool, weight.device, weight.dtype)

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(stage, x, use_reentrant=False)
        return stage(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages `indices` (None: all), and the last map; see timm for the arguments."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = self._stage(stage, x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, widths[-1], H', W')."""
        for stage in self.stages:
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout and classify the map of `forward_features`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        "digits_cnn": {
            "url": "",
            "num_classes": 10,
            "input_size": (1, 8, 8),
            "pool_size": None,
            "mean": (0.0,),
            "std": (1.0,),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "first_conv": "stages.0.0.0",
            "classifier": "head",
        }
    }
)


@register_model
def digits_cnn(pretrained: bool = False, **kwargs) -> SmallCNN:
    """Three stages of 32, 64 and 128 channels with one residual block each."""
    return build_model_with_cfg(
        SmallCNN, "digits_cnn", pretrained, feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"}, **kwargs
    )
