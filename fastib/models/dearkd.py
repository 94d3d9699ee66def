"""DearKD's vision transformer: DeiT with more heads and convolutional attention in its first blocks (Sec. 3.1, 5.1)."""

from collections.abc import Iterable

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from fastib.nn import MHCA, apply_mhca

__all__ = ["DearKDVisionTransformer", "distillation_outputs"]


class DearKDVisionTransformer(VisionTransformer):
    """timm's VisionTransformer whose first blocks attend with a learned relative position bias (`fastib.nn.MHCA`).

    The class token takes part in every attention with a position bias of zero. Any image size, patch size, number of
    channels, width and depth is accepted; `set_input_size` and `dynamic_img_size` move the bias's patch grid along.

    Args:
        mhca_depth: number of leading blocks with MHCA; None gives two thirds of `depth`, the paper's 8 of 12.
        rpe_drop_rate: dropout of the position bias; not stated in the paper.
        kwargs: arguments of timm's VisionTransformer.

    Raises:
        ValueError: `mhca_depth` is not in [0, depth], or `patch_drop_rate` is not 0 (the bias needs the whole grid).
    """

    def __init__(self, *, mhca_depth: int | None = None, rpe_drop_rate: float = 0.1, **kwargs):
        if kwargs.get("patch_drop_rate", 0.0) > 0:
            raise ValueError("patch_drop_rate: expected 0, since MHCA needs the whole patch grid")
        super().__init__(**kwargs)
        depth = len(self.blocks)
        mhca_depth = depth * 2 // 3 if mhca_depth is None else mhca_depth
        if not 0 <= mhca_depth <= depth:
            raise ValueError(f"mhca_depth: expected a number in [0, {depth}], got {mhca_depth}")
        self.mhca_depth = mhca_depth
        apply_mhca(self, blocks=range(mhca_depth), rpe_drop=rpe_drop_rate)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, and the position bias back at its start."""
        super().init_weights(mode, needs_reset=needs_reset)
        for block in self.blocks:
            if isinstance(block.attn, MHCA):
                block.attn.reset_position()

    def _set_grid(self, grid_size: tuple[int, int]) -> None:
        for block in self.blocks:
            if isinstance(block.attn, MHCA):
                block.attn.grid_size = tuple(grid_size)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """New image or patch size: resamples the position embedding and moves the patch grid of the position bias."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._set_grid(self.patch_embed.grid_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:
            self._set_grid(x.shape[1:3])
        return super()._pos_embed(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings and of the parameters of the position bias."""
        names = {name for name, _ in self.named_parameters() if name.endswith((".attn.alpha", ".attn.center"))}
        return super().no_weight_decay() | names


def distillation_outputs(
    vit: VisionTransformer, images: Tensor, blocks: Iterable[int] = ()
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """What DearKD's first stage reads from a student, in one forward pass of any timm VisionTransformer.

    Args:
        vit: the student, with a class token.
        images: (B, C, H, W).
        blocks: indices of the blocks whose content tokens are wanted.

    Returns:
        logits: (B, classes), those of `vit(images)`, from the class token.
        pooled_logits: (B, classes), the same head on the mean of the normalised content tokens.
        tokens: per block its content tokens (B, gh*gw, embed_dim), before the final norm.
    """
    order = sorted(set(blocks))
    if order:
        features, intermediates = vit.forward_intermediates(images, indices=order, output_fmt="NLC")
    else:
        features, intermediates = vit.forward_features(images), []
    pooled = vit.fc_norm(features[:, vit.num_prefix_tokens :].mean(dim=1))
    return vit.forward_head(features), vit.head(vit.head_drop(pooled)), dict(zip(order, intermediates, strict=True))


def _cfg() -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ("dearkd_tiny_patch16_224", "dearkd_small_patch16_224", "dearkd_base_patch16_224")}
)


def _create(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> nn.Module:
    return build_model_with_cfg(
        DearKDVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **defaults, **kwargs},
    )


@register_model
def dearkd_tiny_patch16_224(pretrained: bool = False, **kwargs) -> DearKDVisionTransformer:
    """DearKD-Ti: width 192, 12 blocks (8 with MHCA), 12 heads."""
    return _create("dearkd_tiny_patch16_224", pretrained, {"embed_dim": 192, "num_heads": 12}, kwargs)


@register_model
def dearkd_small_patch16_224(pretrained: bool = False, **kwargs) -> DearKDVisionTransformer:
    """DearKD-S: width 384, 12 blocks (8 with MHCA), 12 heads."""
    return _create("dearkd_small_patch16_224", pretrained, {"embed_dim": 384, "num_heads": 12}, kwargs)


@register_model
def dearkd_base_patch16_224(pretrained: bool = False, **kwargs) -> DearKDVisionTransformer:
    """DearKD-B: width 768, 12 blocks (8 with MHCA), 16 heads."""
    return _create("dearkd_base_patch16_224", pretrained, {"embed_dim": 768, "num_heads": 16}, kwargs)
