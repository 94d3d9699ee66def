"""CiT: a vision transformer with a token per teacher, learned or aligned with its bias (Co-advise, Sec. 3)."""

from collections.abc import Sequence

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from fastib.models.patch_embed import GridPatchEmbed
from fastib.models.rednet import rednet_stem

__all__ = ["AlignedPatchEmbed", "CiT", "Stem"]


def conv_stem(in_chans: int = 3, width: int = 64, device=None, dtype=None) -> nn.Sequential:
    """7x7 convolution of stride 2 and two 3x3 ones, each with BatchNorm and ReLU; (B, width, ceil(H/2), ceil(W/2))."""
    dd, layers = {"device": device, "dtype": dtype}, []
    for before, kernel, stride in ((in_chans, 7, 2), (width, 3, 1), (width, 3, 1)):
        layers += [
            nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, bias=False, **dd),
            nn.BatchNorm2d(width, **dd),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


STEMS = {"conv": conv_stem, "inv": rednet_stem}


class Stem(nn.Module):
    """Layers of one inductive bias that halve the resolution, then a projection of cells to patches.

    (B, in_chans, H, W) -> (B, embed_dim, H / patch, W / patch).

    Args:
        kind: "conv", three convolutions, or "inv", the stem of RedNet.
        width: channels of the layers.
        patch_size: sides of a patch in pixels, even.
    """

    def __init__(
        self, kind: str, in_chans: int, width: int, embed_dim: int, patch_size: tuple[int, int], device=None, dtype=None
    ):
        super().__init__()
        cell = patch_size[0] // 2, patch_size[1] // 2
        self.layers = STEMS[kind](in_chans, width, device=device, dtype=dtype)
        self.proj = nn.Conv2d(width, embed_dim, cell, cell, device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming for the weights of all convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.layers(x))


class AlignedPatchEmbed(GridPatchEmbed):
    """Patch tokens and one token per stem: the sum of the stems' maps, and the mean of each (Sec. 3.2).

    Args:
        stems: kinds of stems, in the order of their tokens.
        stem_width: channels inside the stems.
        img_size, patch_size, in_chans, embed_dim, strict_img_size, dynamic_img_pad: as in timm's PatchEmbed.

    Raises:
        ValueError: no stem, an unknown one, an odd patch size, or an image size that is no multiple of it.
    """

    def __init__(
        self, stems: Sequence[str], stem_width: int = 64, img_size=224, patch_size=16, in_chans: int = 3,
        embed_dim: int = 384, strict_img_size: bool = True, dynamic_img_pad: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        unknown = [kind for kind in stems if kind not in STEMS]
        if unknown or not stems:
            raise ValueError(f"stems: expected some of {', '.join(STEMS)}, got {unknown[0] if unknown else 'none'!r}")
        if any(side < 2 or side % 2 for side in to_2tuple(patch_size)):
            raise ValueError(f"patch_size: expected even numbers, since the stems halve the image, got {patch_size}")
        super().__init__(img_size, patch_size, strict_img_size, dynamic_img_pad)
        self.stems = nn.ModuleList(
            Stem(kind, in_chans, stem_width, embed_dim, self.patch_size, device, dtype) for kind in stems
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, in_chans, H, W). Result: patches (B, gh, gw, embed_dim) and tokens (B, stems, embed_dim).

        ValueError for images of another size, as `fit` says.
        """
        x = self.fit(x)
        maps = [stem(x) for stem in self.stems]
        tokens = torch.stack([y.mean(dim=(2, 3)) for y in maps], dim=1)
        return sum(maps).permute(0, 2, 3, 1), tokens


class CiT(VisionTransformer):
    """timm's VisionTransformer with a token and a head per teacher behind the class token (Co-advise, Fig. 3).

    Without stems the teachers' tokens are learned like the class token. With stems they are computed from the image,
    one token per stem (`AlignedPatchEmbed`). All tokens have position embeddings of their own. `token_logits` gives the
    prediction of every token, which training needs; the model itself gives one prediction per image.

    Args:
        distill_tokens: teachers' tokens; None: one per stem, or 2 without stems.
        stems: () or the kinds of stems ("conv", "inv"), in the order of the teachers.
        stem_width: channels inside the stems.
        inference: "class" predicts from the class token, as the paper says; "mean" from the mean of all tokens' logits,
            as the published code does. Only "mean" reaches every head where such a model is trained on labels alone.
        kwargs: arguments of timm's VisionTransformer.

    Raises:
        ValueError: `distill_tokens` below 1 or not the number of stems, an unknown `inference`, or pooling other than
            "token" and "".
    """

    def __init__(
        self, *, distill_tokens: int | None = None, stems: Sequence[str] = (), stem_width: int = 64,
        inference: str = "class", **kwargs,
    ):  # fmt: skip
        count = (len(stems) or 2) if distill_tokens is None else distill_tokens
        if count < 1 or (stems and count != len(stems)):
            expected = f"one per stem ({len(stems)})" if stems else "at least 1"
            raise ValueError(f"distill_tokens: expected {expected}, got {count}")
        if inference not in ("class", "mean"):
            raise ValueError(f"inference: expected 'class' or 'mean', got {inference!r}")
        for name, only in (("global_pool", ("token", "")), ("class_token", (True,)), ("reg_tokens", (0,))):
            if kwargs.get(name, only[0]) not in only:
                raise ValueError(f"{name}: expected {only[0]!r} in a CiT, got {kwargs[name]!r}")
        if stems:
            kwargs["embed_layer"] = _aligned(tuple(stems), stem_width)
        weight_init = kwargs.pop("weight_init", "")
        super().__init__(**{**kwargs, "reg_tokens": count, "weight_init": "skip"})
        if stems:
            self.reg_token = None  # computed from the image
        self.distill_tokens, self.inference = count, inference
        self._reset_heads()
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, with N(0, 0.02), truncated, for all learned tokens (Sec. 3.2)."""
        super().init_weights(mode, needs_reset=needs_reset)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def _reset_heads(self) -> None:
        def head() -> nn.Module:
            if self.num_classes == 0:
                return nn.Identity()
            like = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
            return nn.Linear(self.embed_dim, self.num_classes, **like)

        self.head_distill = nn.ModuleList(head() for _ in range(self.distill_tokens))

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The head of the class token, then those of the teachers' tokens."""
        return self.head, *self.head_distill

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for all tokens; ValueError for a pooling other than "token" and ""."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool: expected 'token' or '', got {global_pool!r}")
        super().reset_classifier(num_classes, global_pool)
        self._reset_heads()

    def _pos_embed(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if not isinstance(x, tuple):
            return super()._pos_embed(x)
        patches, tokens = x
        grid, patches = patches.shape[1:3], patches.flatten(1, 2)
        position = self.pos_embed
        if position is not None and self.dynamic_img_size:
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            position = resample_abs_pos_embed(position, grid, self.patch_embed.grid_size, prefix)
        if position is not None and self.no_embed_class:
            patches, position = patches + position, None
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens, patches], dim=1)
        return self.pos_drop(x if position is None else x + position)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.get_classifier()
        return tuple(head(self.head_drop(self.fc_norm(x[:, i]))) for i, head in enumerate(heads))

    def token_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, num_classes) of the class token and of each teacher's token, whatever `inference` is."""
        return self._heads(self.forward_features(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of the class token, or the mean of all tokens'; the sequence without pooling."""
        if not self.global_pool:
            return super().forward_head(x, pre_logits)
        if pre_logits:
            x = x[:, 0] if self.inference == "class" else x[:, : self.num_prefix_tokens].mean(dim=1)
            return self.head_drop(self.fc_norm(x))
        if self.inference == "class":
            return self.head(self.head_drop(self.fc_norm(x[:, 0])))
        return torch.stack(self._heads(x)).mean(dim=0)


def _aligned(stems: tuple[str, ...], stem_width: int):
    def embed(bias: bool = True, output_fmt: str | None = None, **kwargs) -> AlignedPatchEmbed:
        return AlignedPatchEmbed(stems, stem_width, **kwargs)

    return embed


def _cfg(**kwargs) -> dict:
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
        "classifier": ("head", "head_distill.0", "head_distill.1"),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cit_tiny_patch16_224": _cfg(),
        "cit_small_patch16_224": _cfg(),
        "cit_small_aligned_patch16_224": _cfg(
            first_conv=("patch_embed.stems.0.layers.0", "patch_embed.stems.1.layers.conv1")
        ),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> CiT:
    return build_model_with_cfg(
        CiT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **defaults, **kwargs},
    )


@register_model
def cit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> CiT:
    """CiT-Ti: width 192, 12 blocks, 3 heads, learned tokens."""
    return _create("cit_tiny_patch16_224", pretrained, {"embed_dim": 192, "num_heads": 3}, kwargs)


@register_model
def cit_small_patch16_224(pretrained: bool = False, **kwargs) -> CiT:
    """CiT-S: width 384, 12 blocks, 6 heads, learned tokens."""
    return _create("cit_small_patch16_224", pretrained, {"embed_dim": 384, "num_heads": 6}, kwargs)


@register_model
def cit_small_aligned_patch16_224(pretrained: bool = False, **kwargs) -> CiT:
    """CiT-SAK: CiT-S with a convolution stem and an involution stem in place of the patch projection."""
    defaults = {"embed_dim": 384, "num_heads": 6, "stems": ("conv", "inv")}
    return _create("cit_small_aligned_patch16_224", pretrained, defaults, kwargs)
