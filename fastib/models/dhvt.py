"""DHVT: a vision transformer with convolutions in its embedding and MLPs, and a token per head (DHVT, Sec. 3)."""

import re

import torch
from timm.layers import Attention, DropPath, Mlp, PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastib.models.patch_embed import GridPatchEmbed
from fastib.nn import DAFF, SOPE, HeadTokenAttention

__all__ = ["DHVT", "ConvPatchEmbed", "checkpoint_filter_fn", "convert_published_dhvt"]


class ConvPatchEmbed(GridPatchEmbed):
    """`fastib.nn.SOPE` in the place of timm's PatchEmbed.

    Args:
        img_size, patch_size, in_chans, embed_dim, strict_img_size, dynamic_img_pad, output_fmt: as in timm's
            PatchEmbed. patch_size is one number, a power of 2.

    Raises:
        ValueError: a patch size or width that SOPE does not take, or an image size that is no multiple of the former.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans: int = 3, embed_dim: int = 192, strict_img_size: bool = True,
        dynamic_img_pad: bool = False, output_fmt: str | None = None, bias: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(img_size, patch_size, strict_img_size, dynamic_img_pad)
        if self.patch_size[0] != self.patch_size[1]:
            raise ValueError(f"patch_size: expected a square, got {patch_size}")
        self.keep_grid = output_fmt == "NHWC"
        self.sope = SOPE(self.patch_size[0], in_chans, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W). Result: (B, gh gw, embed_dim), or (B, gh, gw, embed_dim) for the format "NHWC".

        ValueError for images of another size, as `fit` says.
        """
        tokens = self.sope(self.fit(x))
        return tokens if self.keep_grid else tokens.flatten(1, 2)


class Block(nn.Module):
    """x + attn(norm1 x), then x + mlp(norm2 x); (B, N, dim), the class token first."""

    def __init__(
        self, dim: int, num_heads: int, head_tokens: bool, daff: bool, grid_size: tuple[int, int], mlp_ratio: float,
        qkv_bias: bool, proj_bias: bool, proj_drop: float, attn_drop: float, drop_path: float, norm_layer, act_layer,
        device, dtype,
    ):  # fmt: skip
        super().__init__()
        dd, hidden = {"device": device, "dtype": dtype}, int(dim * mlp_ratio)
        attention = HeadTokenAttention if head_tokens else Attention
        self.norm1, self.norm2 = norm_layer(dim, **dd), norm_layer(dim, **dd)
        self.attn = attention(
            dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        if daff:
            self.mlp = DAFF(dim, hidden, grid_size, **dd)
        else:
            self.mlp = Mlp(dim, hidden, act_layer=act_layer, bias=proj_bias, drop=proj_drop, **dd)
        self.drop_path1, self.drop_path2 = (DropPath(drop_path) if drop_path > 0 else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


FIXED = {"class_token": True, "reg_tokens": 0, "patch_drop_rate": 0.0, "qk_norm": False, "scale_attn_norm": False,
         "scale_mlp_norm": False, "init_values": None, "pre_norm": False}  # fmt: skip


class DHVT(VisionTransformer):
    """timm's VisionTransformer of SOPE, HI-MHSA and DAFF (`fastib.nn`), without position embeddings (DHVT, Fig. 1).

    Any image size, number of channels, width and depth; any power of 2 as patch size; `set_input_size` and
    `dynamic_img_size` move the grid of the convolutions along. As in the published code, `no_weight_decay` spares the
    class token alone: the affine maps and the head embeddings are decayed.

    Args:
        head_tokens, sope, daff: False puts timm's Attention, PatchEmbed or Mlp there (Tables 5 and 6).
        kwargs: arguments of timm's VisionTransformer; `pos_embed` is "none" unless it is given.

    Raises:
        ValueError: a patch size that is no power of 2, or an argument of timm's that DHVT has no place for.
    """

    def __init__(self, *, head_tokens: bool = True, sope: bool = True, daff: bool = True, **kwargs):
        for name, only in FIXED.items():
            if kwargs.get(name, only) != only:
                raise ValueError(f"{name}: expected {only!r} in a DHVT, got {kwargs[name]!r}")

        def block(depth: int, mlp_layer, attn_layer, **options) -> Block:
            parts = {"head_tokens": head_tokens, "daff": daff, "grid_size": self.patch_embed.grid_size}
            return Block(**parts, **{name: value for name, value in options.items() if name not in FIXED})

        kwargs["embed_layer"] = ConvPatchEmbed if sope else PatchEmbed
        super().__init__(**{"pos_embed": "none", **kwargs, "block_fn": block})

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, with N(0, 0.02), truncated, for the class token too."""
        super().init_weights(mode, needs_reset=needs_reset)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _set_grid(self, grid_size: tuple[int, int]) -> None:
        for block in self.blocks:
            if isinstance(block.mlp, DAFF):
                block.mlp.grid_size = tuple(grid_size)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """A new image size; ValueError for another patch size, which SOPE is made for."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._set_grid(self.patch_embed.grid_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:
            self._set_grid(x.shape[1:3])
        return super()._pos_embed(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token, and position embeddings where there are any."""
        return {"cls_token", "pos_embed"}


_SOPE = {"pre_affine": "pre", "post_affine": "post"}
_LAYERS = {"attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "attn.ht_proj": "attn.head_proj", "norm1": "norm1",
           "norm2": "norm2", "attn.ht_norm": "attn.head_norm", "mlp.compress": "mlp.reduce",
           "mlp.excitation": "mlp.expand", **{f"mlp.conv{i}": f"mlp.conv{i}" for i in (1, 2, 3)},
           **{f"mlp.bn{i}": f"mlp.norm{i}" for i in (1, 2, 3)}}  # fmt: skip


def convert_published_dhvt(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a model of the published code (ArieSeirack/DHVT) with the names of `DHVT`; values stay as they are.

    Its checkpoints have keys such as ``blocks.0.attn.ht_proj.weight``, below a key ``model`` or not, with or without
    ``module.``. They are pickled, which fastib never loads; convert one where it came from can be trusted:
    ``save_file(convert_published_dhvt(torch.load(path, weights_only=True)), "dhvt.safetensors")``.

    Raises:
        ValueError: a key that no published DHVT has.
    """
    state_dict = state_dict.get("model", state_dict)
    return {_convert_key(key.removeprefix("module.")): value for key, value in state_dict.items()}


def _convert_key(key: str) -> str:
    path, _, tensor = key.rpartition(".")
    if key == "cls_token" or path in ("norm", "head"):
        return key
    if match := re.fullmatch(r"patch_embed\.(pre_affine|post_affine)", path):
        return f"patch_embed.sope.{_SOPE[match[1]]}.{tensor}"
    if match := re.fullmatch(r"patch_embed\.proj\.([0246])\.([01])", path):  # GELUs have the odd numbers
        return f"patch_embed.sope.stages.{int(match[1]) // 2}.{match[2]}.{tensor}"
    if match := re.fullmatch(r"(blocks\.\d+)\.(.+)", key):
        block, name = match[1], match[2].rpartition(".")[0]
        if match[2] == "attn.pos_embed":
            return f"{block}.attn.head_embed"
        if name in _LAYERS:
            return f"{block}.{_LAYERS[name]}.{tensor}"
    raise ValueError(f"state_dict: expected keys of a published DHVT, got {key!r}")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under our names as they are; those of a published checkpoint converted.

    The affine map of the image is brought to the model's channels as timm brings the first convolution, whose weights
    it adds up for one channel and repeats for others.
    """
    state_dict = state_dict.get("model", state_dict)
    published = any(".ht_proj." in key for key in state_dict)
    state_dict = convert_published_dhvt(state_dict) if published else dict(state_dict)
    for name in ("alpha", "beta"):
        key = f"patch_embed.sope.pre.{name}"
        if key in state_dict and state_dict[key].shape[1] != model.in_chans:
            affine, count = state_dict[key], model.in_chans
            repeated = affine.repeat(1, -(-count // affine.shape[1]), 1, 1)[:, :count]
            state_dict[key] = affine.mean(1, keepdim=True) if count == 1 else repeated
    return state_dict


def _cfg(size: int, num_classes: int, first_conv: str) -> dict:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875 if size > 32 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
    }


_FIRST = "patch_embed.sope.stages.0.0"
default_cfgs = generate_default_cfgs(
    {f"dhvt_{width}_patch{patch}_32": _cfg(32, 100, _FIRST) for width in ("tiny", "small") for patch in (2, 4)}
    | {f"dhvt_{width}_patch16_224": _cfg(224, 1000, _FIRST) for width in ("tiny", "small")}
)


def _create(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> DHVT:
    return build_model_with_cfg(
        DHVT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"depth": 12, **defaults, **kwargs},
    )


TINY, SMALL = {"embed_dim": 192, "num_heads": 4}, {"embed_dim": 384, "num_heads": 8}


@register_model
def dhvt_tiny_patch4_32(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for images of 32 pixels: width 192, 12 blocks, 4 heads, 8 x 8 patches."""
    return _create("dhvt_tiny_patch4_32", pretrained, {"img_size": 32, "patch_size": 4, **TINY}, kwargs)


@register_model
def dhvt_tiny_patch2_32(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for images of 32 pixels: width 192, 12 blocks, 4 heads, 16 x 16 patches."""
    return _create("dhvt_tiny_patch2_32", pretrained, {"img_size": 32, "patch_size": 2, **TINY}, kwargs)


@register_model
def dhvt_small_patch4_32(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for images of 32 pixels: width 384, 12 blocks, 8 heads, 8 x 8 patches."""
    return _create("dhvt_small_patch4_32", pretrained, {"img_size": 32, "patch_size": 4, **SMALL}, kwargs)


@register_model
def dhvt_small_patch2_32(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for images of 32 pixels: width 384, 12 blocks, 8 heads, 16 x 16 patches."""
    return _create("dhvt_small_patch2_32", pretrained, {"img_size": 32, "patch_size": 2, **SMALL}, kwargs)


@register_model
def dhvt_tiny_patch16_224(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-T for images of 224 pixels: width 192, 12 blocks, 3 heads; num_heads=4 is the paper's for DomainNet."""
    return _create("dhvt_tiny_patch16_224", pretrained, {"patch_size": 16, **TINY, "num_heads": 3}, kwargs)


@register_model
def dhvt_small_patch16_224(pretrained: bool = False, **kwargs) -> DHVT:
    """DHVT-S for images of 224 pixels: width 384, 12 blocks, 6 heads."""
    return _create("dhvt_small_patch16_224", pretrained, {"patch_size": 16, **SMALL, "num_heads": 6}, kwargs)
