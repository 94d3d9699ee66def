"""DHVT: the architecture is the method (DHVT, Sec. 3); it trains on labels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastib.methods.base import Analysis, LoadTeacher, MethodOptions, register_method
from fastib.methods.plain import Plain
from fastib.nn import HeadTokenAttention


@torch.no_grad()
def head_token_maps(student: nn.Module, images: Tensor, layer: int) -> Tensor:
    """What the head tokens of a layer attend to: (B, tokens, heads, N), each row a share of 1 that the N tokens get.

    student: a model with `HeadTokenAttention` layers, in evaluation mode. layer: counted from 1, as in Fig. 4.
    ValueError where there is no such layer.
    """
    layers = [module for module in student.modules() if isinstance(module, HeadTokenAttention)]
    if not 1 <= layer <= len(layers):
        raise ValueError(f"layer: expected a number in [1, {len(layers)}], got {layer}")
    seen: list[Tensor] = []
    handle = layers[layer - 1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        student(images)
    finally:
        handle.remove()
    return layers[layer - 1].head_attention(seen[0])


def analyze_head_tokens(
    tensors: dict[str, Tensor],
    folder: Path,
    layer: int = 2,
    count: int = 8,
    head: int | None = None,
    *,
    student: nn.Module,
    images: Callable[[int], tuple[Tensor, Tensor]],
) -> Analysis:
    """Fig. 4: the attention of each head token to the patches in one layer, over some images.

    folder: where head_tokens.png goes. layer: counted from 1. count: of images. head: the attention head, from 1; None
    shows the mean of all. student: the trained model. images: gives `count` inputs and their pictures in [0, 1].
    """
    if type(count) is not int or count < 1:
        raise ValueError(f"count: expected a number of at least 1, got {count!r}")
    if type(layer) is not int:
        raise ValueError(f"layer: expected a number, got {layer!r}")
    inputs, pictures = images(count)
    maps = head_token_maps(student, inputs, layer)
    heads = maps.shape[2]
    if head is not None and not (type(head) is int and 1 <= head <= heads):
        raise ValueError(f"head: expected a number in [1, {heads}], got {head!r}")
    shares = maps.mean(2) if head is None else maps[:, :, head - 1]  # (B, T, N)
    patches = shares[:, :, 1:]
    grid = student.patch_embed.grid_size
    path = folder / "head_tokens.png"
    which = "mean of the heads" if head is None else f"head {head}"
    draw_head_tokens(pictures, patches.unflatten(2, grid), path, f"layer {layer}, {which}")
    rows = {}
    normal = nn.functional.normalize(patches, dim=2)
    alike = (normal @ normal.transpose(1, 2)).mean(0)  # (T, T) mean cosines
    for t in range(heads):
        others = (alike[t].sum() - alike[t, t]) / max(heads - 1, 1)
        spread = patches[:, t] / patches[:, t].sum(1, keepdim=True)
        rows[f"head token {t + 1}"] = {
            "to the patches": patches[:, t].sum(1).mean().item(),
            "to the class token": shares[:, t, 0].mean().item(),
            "to the head tokens": (1 - shares[:, t].sum(1)).mean().item(),
            "patches it spreads over": torch.special.entr(spread).sum(1).exp().mean().item(),
            "cosine with the others": others.item(),
        }
    return Analysis({f"attention of the head tokens, layer {layer}, {which}, {len(inputs)} images": rows}, [path])


def draw_head_tokens(pictures: Tensor, maps: Tensor, path: Path, title: str) -> None:
    """A row per image: the picture (C, H, W), then a map per head token, each in its own range; a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, tokens = maps.shape[:2]
    figure = Figure(figsize=(1.1 * (tokens + 1), 1.1 * count + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(count, tokens + 1, squeeze=False)
    for row in range(count):
        picture = pictures[row].clamp(0, 1).numpy()
        axes[row][0].imshow(
            picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1
        )
        for token in range(tokens):
            axes[row][token + 1].imshow(maps[row, token].numpy(), cmap="viridis")
    for column, axis in enumerate(axes[0]):
        axis.set_title("image" if column == 0 else f"token {column}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)


@dataclass
class DHVTOptions(MethodOptions):
    """Options of `DHVTMethod`.

    Attributes:
        sync_norms: average the BatchNorm statistics of the patch embedding over the processes, which must be on GPUs,
            as the published model does.
    """

    sync_norms: bool = False


@register_method("dhvt")
class DHVTMethod(Plain):
    """Cross entropy between a DHVT's logits and the targets.

    Raises ValueError for a student without head tokens.
    """

    Options = DHVTOptions
    analyses: ClassVar[dict] = {"head-tokens": analyze_head_tokens}

    def __init__(self, options: DHVTOptions, student: nn.Module, num_classes: int, load_teacher: LoadTeacher | Any):
        super().__init__(options, student, num_classes, load_teacher)
        if not any(isinstance(module, HeadTokenAttention) for module in student.modules()):
            raise ValueError(
                f"student: expected a model with head tokens, such as dhvt_tiny_patch4_32, got {type(student).__name__}"
            )
        if options.sync_norms:
            student.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(student.patch_embed)
