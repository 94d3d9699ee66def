"""AAL: attention maps of a vision transformer, linked to the maps of a CNN (Jin and Choi, adaptive attention links)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastib.methods.base import Analysis, LoadTeacher, Method, MethodOptions, register_method, wide
from fastib.methods.links import draw_links, link_mask, select_links, write_mask
from fastib.nn.attention_link import AttentionLink
from fastib.nn.capture import capture_cls_attention

__all__ = ["AAL", "AALOptions", "analyze_links", "cnn_stages", "stage_maps"]

_STEMS = ("stem", "conv", "bn", "norm", "act", "relu")  # what a CNN's first feature is called where no stage made it


@dataclass
class AALOptions(MethodOptions):
    """Options of AAL; the defaults are the paper's values, where the paper gives none the line says so.

    Attributes:
        teacher: the CNN, trained on any images: "timm:NAME", "run:PATH" or a checkpoint path.
        weight: lambda of Eq. 6 at the start.
        decay: factors of lambda per epoch, one for each of `decay_epochs`.
        decay_epochs: lengths of the phases of the decay in epochs. Their sum stands for the whole run: one of another
            length runs through the same values.
        links: "full"; "alpha" or "beta", Table 1, for 7 levels and 12 layers; or a file of `fastib analyze links`.
        teacher_stages: the CNN's stages, from 0, whose maps are taken; empty: all.
        over: softmax over the "patches" (Eq. 3) or over "all" tokens.
        scale: factor of the attention's dot products; null: the model's own, 1/sqrt(d). 1 is Eq. 3 as printed.
        antialias: of the bicubic resizing of the CNN's maps (not given).
    """

    teacher: str = ""
    weight: float = 2000.0
    decay: list[float] = field(default_factory=lambda: [0.99, 0.98])
    decay_epochs: list[int] = field(default_factory=lambda: [200, 100])
    links: str = "full"
    teacher_stages: list[int] = field(default_factory=list)
    over: str = "patches"
    scale: float | None = None
    antialias: bool = False


def cnn_stages(teacher: nn.Module) -> list[int] | None:
    """Indices of a timm CNN's stages behind its stem in `forward_intermediates`; None where `blocks` are its stages.

    timm's own features of an EfficientNet skip the stages that keep the resolution; the paper takes all seven.
    """
    if hasattr(teacher, "conv_stem") and isinstance(getattr(teacher, "blocks", None), nn.Sequential):
        return None
    if not hasattr(teacher, "forward_intermediates") or not hasattr(teacher, "feature_info"):
        raise ValueError(
            f"teacher: expected a CNN of timm, but {type(teacher).__name__} has no feature_info and "
            "forward_intermediates"
        )
    names = [info["module"].rpartition(".")[2] for info in teacher.feature_info]
    return [i for i, name in enumerate(names) if i > 0 or not name.startswith(_STEMS)]


def stage_maps(teacher: nn.Module, images: Tensor, stages: Iterable[int] = ()) -> list[Tensor]:
    """Maps (B, c, h, w) that the given stages of a timm CNN put out; all stages where none is given."""
    order, indices = list(stages), cnn_stages(teacher)
    if indices is None:
        x, maps = teacher.bn1(teacher.conv_stem(images)), []
        for stage in teacher.blocks[: max(order) + 1 if order else None]:
            x = stage(x)
            maps.append(x)
    else:
        last = indices[: max(order) + 1] if order else indices
        maps = teacher.forward_intermediates(images, indices=last, stop_early=True, intermediates_only=True)
    return [maps[i] for i in order] if order else maps


def analyze_links(tensors: dict[str, Tensor], folder: Path, threshold: float = 0.05) -> Analysis:
    """Fig. 2 and Algorithm 1 for the trained links of an `AAL`.

    tensors: its state dict. folder: where links.png and links.safetensors go, the latter for method.links of another
    run. threshold: theta_l of Algorithm 1.
    """
    levels, layers = tensors["levels"], tensors["layers"]
    weight = torch.full((len(levels), len(layers)), math.nan)
    for group in sorted({name.split(".")[1] for name in tensors if name.startswith("groups.")}, key=int):
        own = {name: tensors.get(f"groups.{group}.{name}") for name in ("channels", "columns", "link.mask")}
        links = tensors[f"groups.{group}.link.weight"].float()
        if own["link.mask"] is not None:
            links = links.masked_fill(~own["link.mask"], math.nan)
        weight[own["channels"][:, None], own["columns"]] = links
    selection = select_links(weight, levels, layers, threshold)
    picture, file = folder / "links.png", folder / "links.safetensors"
    draw_links(selection, picture, f"links; above {threshold:g} framed")
    write_mask(file, selection.mask)
    rows = {}
    for level, values in enumerate(selection.strength.tolist(), 1):
        kept = [str(i + 1) for i in selection.kept[level - 1].nonzero()[:, 0].tolist()]
        row = {str(layer): round(value, 3) for layer, value in enumerate(values, 1)}
        rows[f"CNN level {level}"] = row | {"kept layers": ", ".join(kept) or "none"}
    note = f"{int(selection.mask.sum())} of {int((~weight.isnan()).sum())} links kept; train with method.links={file}"
    return Analysis({"links between CNN levels and ViT layers": rows}, [picture, file], note)


class LinkGroup(nn.Module):
    """The links to the attention maps of one grid.

    Buffers: columns, which of the student's M maps these are; channels, which of the teacher's C maps have links.
    """

    def __init__(self, columns: Tensor, channels: Tensor, mask: Tensor | None):
        super().__init__()
        self.link = AttentionLink(len(columns), len(channels), mask)
        self.register_buffer("columns", columns)
        self.register_buffer("channels", channels)


@register_method("aal")
class AAL(Method):
    """Eq. 6: L = CE + lambda mean_c (a_c / |a_c| - b_c / |b_c|)^2, lambda falling with every epoch.

    a_c are linear combinations, with trained weights, of the class token's attention maps in all layers and heads
    (Eq. 3-4), b_c the maps of a frozen CNN, resized to the grid of the patches. Where layers differ in their grid, as
    in PiT, the layers of each grid have links of their own, and the term is the mean of theirs.
    """

    Options = AALOptions
    analyses: ClassVar[dict] = {"links": analyze_links}

    def __init__(self, options: AALOptions, student: nn.Module, num_classes: int, load_teacher: LoadTeacher):
        super().__init__(options, student, num_classes, load_teacher)
        _check(options)
        try:
            self.capture = capture_cls_attention(student, over=options.over, scale=options.scale)
        except ValueError as error:
            raise ValueError(f"student: {error}") from error
        teacher = self.freeze("teacher", load_teacher(options.teacher))
        heads, channels = self._probe(teacher)
        layers = torch.arange(len(heads)).repeat_interleave(torch.tensor(heads))
        levels = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))
        self.register_buffer("levels", levels)
        self.register_buffer("layers", layers)
        mask = link_mask(options.links, levels, layers)
        mask = torch.ones(len(levels), len(layers), dtype=torch.bool) if mask is None else mask
        order = list(dict.fromkeys(self.capture.grids))
        grid_of_map = torch.tensor([order.index(grid) for grid in self.capture.grids])[layers]
        self.capture.clear()
        self.groups = nn.ModuleList()
        self.grid_of_group = []
        for grid in range(len(order)):
            columns = (grid_of_map == grid).nonzero()[:, 0]
            channels = mask[:, columns].any(1).nonzero()[:, 0]
            if len(channels):
                kept = mask[channels][:, columns]
                self.groups.append(LinkGroup(columns, channels, None if kept.all() else kept))
                self.grid_of_group.append(grid)

    @torch.no_grad()
    def _probe(self, teacher: nn.Module) -> tuple[list[int], list[int]]:
        """Heads of each layer of the student and channels of each stage of the teacher, from one empty image."""
        student, embedding = self.student, self.capture.embedding
        size = getattr(getattr(student, "patch_embed", None), "img_size", None) or _config(student)["input_size"][1:]
        in_chans = getattr(student, "in_chans", None) or embedding.weight.shape[1]
        weight = next(student.parameters())
        image = torch.zeros(1, in_chans, *size, device=weight.device, dtype=weight.dtype)
        training = {module: module.training for module in student.modules()}
        student.eval()
        with self.capture:
            student(image)
        for module, mode in training.items():
            module.training = mode
        stages = self.options.teacher_stages
        known = cnn_stages(teacher)
        count = len(teacher.blocks) if known is None else len(known)
        for stage in stages:
            if not 0 <= stage < count:
                raise ValueError(f"teacher_stages: expected indices in [0, {count - 1}], got {stage}")
        parameter = next(teacher.parameters())
        try:
            maps = stage_maps(teacher, image.to(parameter.device, parameter.dtype), stages)
        except RuntimeError as error:
            raise ValueError(f"teacher: it does not take images of shape {tuple(image.shape[1:])}: {error}") from error
        return [m.shape[1] for m in self.capture.maps], [m.shape[1] for m in maps]

    def weight_at(self, progress: float) -> float:
        """lambda at `progress` in [0, 1) of the run: constant within an epoch of the paper's schedule."""
        epoch = math.floor(progress * sum(self.options.decay_epochs) + 1e-9)
        weight = self.options.weight
        for factor, length in zip(self.options.decay, self.options.decay_epochs, strict=True):
            weight *= factor ** min(epoch, length)
            epoch = max(epoch - length, 0)
        return weight

    def losses(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses "ce" and "attention", whose sum is Eq. 6.

        images: (B, C, H, W). targets: (B,) int64, or (B, classes) probabilities.
        """
        weight = self.weight_at(progress)
        if weight == 0:  # nothing to link; DistributedDataParallel waits for the links' gradients all the same
            ce = F.cross_entropy(wide(self.student(images)), targets)
            return {"ce": ce, "attention": 0.0 * sum(p.sum() for p in self.groups.parameters())}
        with self.capture as captured:
            logits = self.student(images)
        attention, grids = captured.maps, captured.grids
        captured.clear()  # else the maps and their graph would live until the next step
        with torch.no_grad():
            maps = stage_maps(self.frozen["teacher"], images, self.options.teacher_stages)
        return {
            "ce": F.cross_entropy(wide(logits), targets),
            "attention": weight * self.link_loss(attention, grids, maps),
        }

    def link_loss(self, attention: list[Tensor], grids: list[tuple[int, int]], maps: list[Tensor]) -> Tensor:
        """Eq. 5 of attention maps (B, heads, patches) and grids per layer, the CNN's maps (B, c, h, w) per stage."""
        order = list(dict.fromkeys(grids))
        terms = []
        for index, group in zip(self.grid_of_group, self.groups, strict=True):
            grid = order[index]
            attn = torch.cat([a for a, g in zip(attention, grids, strict=True) if g == grid], dim=1)
            resized = [_resize(m, grid, self.options.antialias).flatten(2) for m in maps]
            target = torch.cat(resized, dim=1).to(attn.dtype)
            if len(group.channels) < target.shape[1]:
                target = target.index_select(1, group.channels)
            terms.append(group.link.loss(attn, target))
        return torch.stack(terms).mean()


def _resize(x: Tensor, grid: tuple[int, int], antialias: bool) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(grid):
        return x
    return F.interpolate(x, size=tuple(grid), mode="bicubic", align_corners=False, antialias=antialias)


def _config(model: nn.Module) -> dict:
    return getattr(model, "pretrained_cfg", None) or {"input_size": (3, 224, 224)}


def _check(options: AALOptions) -> None:
    if not options.teacher:
        raise ValueError("teacher: AAL needs a CNN, e.g. teacher=timm:efficientnet_b3 or teacher=run:PATH")
    if not (math.isfinite(options.weight) and options.weight >= 0):
        raise ValueError(f"weight: expected a number of at least 0, got {options.weight}")
    if not options.decay or len(options.decay) != len(options.decay_epochs):
        raise ValueError(f"decay: expected one factor per entry of decay_epochs, got {len(options.decay)}")
    for name, values, low in (("decay", options.decay, 0), ("decay_epochs", options.decay_epochs, 1)):
        for value in values:
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name}: expected numbers of at least {low}, got {value}")
