"""The vision transformers and agent CNNs of Bootstrapping ViTs (Zhang et al., CVPR 2022, Tables 1-2)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from fastib.models.agent_cnn import AgentCNN, describe_agent

__all__ = ["BootstrapVisionTransformer"]


class BootstrapVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with the initialisation of the published code.

    Weights of attention and MLP are Xavier-uniform (qkv as one matrix), class token and position embedding N(0, 0.02).
    Where the code draws the MLPs' biases with a standard deviation of 1 in place of 1e-6, and the patch projection from
    N(0, 1), 1e-6 and PyTorch's own initialisation are used.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draws all weights."""
        super().init_weights(mode, needs_reset=needs_reset)
        for block in self.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                if linear.bias is not None:
                    nn.init.normal_(linear.bias, std=1e-6)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if needs_reset:
            self.patch_embed.proj.reset_parameters()


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        **kwargs,
    }


_VIT = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
default_cfgs = generate_default_cfgs({
    "bootstrap_vit_small_patch16_224": _cfg(**_VIT),
    "bootstrap_vit_base_patch16_224": _cfg(**_VIT),
    "agent_cnn_small": _cfg(first_conv="stem.conv1", classifier="head"),
    "agent_cnn_base": _cfg(first_conv="stem.conv1", classifier="head"),
})  # fmt: skip


def _create_vit(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> BootstrapVisionTransformer:
    return build_model_with_cfg(
        BootstrapVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, **defaults, **kwargs},
    )


@register_model
def bootstrap_vit_small_patch16_224(pretrained: bool = False, **kwargs) -> BootstrapVisionTransformer:
    """ViT-S of the paper: width 288, 6 blocks, 9 heads, dropout 0.1."""
    rates = dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), 0.1)
    defaults = {"embed_dim": 288, "depth": 6, "num_heads": 9, "norm_layer": _norm(1e-5), **rates}
    return _create_vit("bootstrap_vit_small_patch16_224", pretrained, defaults, kwargs)


@register_model
def bootstrap_vit_base_patch16_224(pretrained: bool = False, **kwargs) -> BootstrapVisionTransformer:
    """ViT-B of the paper, which has the size of DeiT-S: width 384, 12 blocks, 6 heads."""
    defaults = {"embed_dim": 384, "depth": 12, "num_heads": 6, "norm_layer": _norm(1e-6)}
    return _create_vit("bootstrap_vit_base_patch16_224", pretrained, defaults, kwargs)


def _norm(eps: float) -> Any:
    def norm(dim: int, **kwargs) -> nn.LayerNorm:
        return nn.LayerNorm(dim, eps=eps, **kwargs)

    return norm


def _create_agent(variant: str, vit: str, pretrained: bool, settings: dict, kwargs: dict) -> AgentCNN:
    """The agent that `vit` has, by itself: with weights of its own."""
    with torch.device("meta"):
        described = describe_agent(globals()[vit](), form=kwargs.pop("form", "res"), **settings)
    return build_model_with_cfg(
        AgentCNN,
        variant,
        pretrained,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**described, "drop_rate": 0.1, "proj_drop_rate": 0.0, **kwargs},
    )


@register_model
def agent_cnn_small(pretrained: bool = False, **kwargs) -> AgentCNN:
    """The agent of ViT-S: 9 taps, pre-norm. form: "res" (a ResNet's stem, smaller maps after blocks 0, 1) or "base"."""
    settings = {"down_sample": (0, 1)} if kwargs.get("form", "res") == "res" else {}
    return _create_agent("agent_cnn_small", "bootstrap_vit_small_patch16_224", pretrained, settings, kwargs)


@register_model
def agent_cnn_base(pretrained: bool = False, **kwargs) -> AgentCNN:
    """The agent of ViT-B: 6 taps, post-norm. form: "res" (ResNet stem, smaller maps after blocks 2, 8) or "base"."""
    settings = {"pre_norm": False}
    return _create_agent("agent_cnn_base", "bootstrap_vit_base_patch16_224", pretrained, settings, kwargs)
