"""Bootstrapping ViTs: a transformer and its agent CNN learn from each other (Zhang et al., CVPR 2022, Sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastib.methods.base import LoadTeacher, Method, MethodOptions, register_method, wide
from fastib.methods.co_advise import divergence
from fastib.models.agent_cnn import agent_for
from fastib.ops import feature_alignment_loss

__all__ = ["Bootstrap", "BootstrapOptions", "align_gradients"]


@dataclass
class BootstrapOptions(MethodOptions):
    """Options of Bootstrapping ViTs; the defaults are the paper's values for training with separate weights.

    Attributes:
        shared: the agent uses the ViT's own tensors (the paper's "Shared"); else it has weights of its own ("Joint").
        align: of shared weights: "tensor" or "all" projects the agent's gradient where it points against the ViT's,
            tensor by tensor or all of them as one vector, and halves the sum (Algorithm 1); "none" adds the two up, as
            the published code does.
        form, pre_norm, down_sample: the agent, see `fastib.models.agent_for`; down_sample [-1] is its default.
        label_weight, mutual_weight, feature_weight: of the labels' terms of both networks, of Eq. 8 (each way), and of
            Eq. 7. The published code has 1, 1, 10 without and 0.5, 0.5, 5 with shared weights; the paper calls the
            last two alpha and beta, where Eq. 9 has them the other way round.
        temperature: T of Eq. 8.
        layers: blocks (from 0) whose features are compared; empty: all.
        pooling: "sequence" averages the longer row of tokens to the length of the shorter, as the paper does by
            default; "2d" averages squares of the larger map (its ablation).
        decay: "linear", to 0 at the end of the run, or "none", of the feature term.
    """

    shared: bool = False
    align: str = "tensor"
    form: str = "res"
    pre_norm: bool = True
    down_sample: list[int] = field(default_factory=lambda: [-1])
    label_weight: float = 1.0
    mutual_weight: float = 1.0
    feature_weight: float = 10.0
    temperature: float = 4.0
    layers: list[int] = field(default_factory=list)
    pooling: str = "sequence"
    decay: str = "linear"


def align_gradients(pairs: Iterable[tuple[Tensor, Tensor]], scope: str = "tensor") -> None:
    """Algorithm 1 for shared weights, in place: g_V becomes (g_V + g) / 2, g what is left of the agent's gradient.

    Where <g_A, g_V> < 0, g = g_A - <g_A, g_V> / |g_V|^2 g_V, which is at right angles to g_V; else g = g_A. pairs: the
    two of each tensor. scope: "tensor", each for itself, or "all", all as one vector. Sums are float32 at least.
    """
    pairs = list(pairs)
    if not pairs:
        return
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    products = torch.stack([torch.sum(v * a, dtype=wide) for v, a in pairs])
    squares = torch.stack([torch.sum(v * v, dtype=wide) for v, _ in pairs])
    if scope == "all":
        products, squares = products.sum().expand_as(products), squares.sum().expand_as(squares)
    against = (products < 0) & (squares > 0)
    keep = 0.5 - torch.where(against, 0.5 * products / squares, 0.0)  # of g_V in the half sum
    for (v, a), factor in zip(pairs, keep.unbind(), strict=True):
        v.mul_(factor.to(v.dtype)).add_(a, alpha=0.5)


@register_method("bootstrap")
class Bootstrap(Method):
    """Eq. 9: both networks learn from the labels and from each other (Eq. 8), the ViT also from the agent's maps.

    Neither network's losses reach into the other, so that of shared weights one backward pass gives both gradients:
    the ViT's in the parameters, the agent's in leaves of its own on the same memory.
    """

    Options = BootstrapOptions

    def __init__(self, options: BootstrapOptions, student: nn.Module, num_classes: int, load_teacher: LoadTeacher):
        super().__init__(options, student, num_classes, load_teacher)
        _check(options)
        if not hasattr(student, "forward_intermediates"):
            raise ValueError(f"student: expected a timm ViT, but {type(student).__name__} has no forward_intermediates")
        down_sample = None if options.down_sample == [-1] else options.down_sample
        self.agent = agent_for(
            student, options.shared, form=options.form, pre_norm=options.pre_norm, down_sample=down_sample
        )
        size = getattr(student.patch_embed, "img_size", None)
        if size is not None:
            with torch.no_grad():  # raises where the maps become too small
                image = next(student.parameters()).new_zeros(1, student.patch_embed.proj.in_channels, *size)
                self.agent.eval()(image)
                self.agent.train(student.training)
        depth = len(student.blocks)
        for layer in options.layers:
            if not 0 <= layer < depth:
                raise ValueError(f"layers: expected blocks in [0, {depth - 1}], got {layer}")
        self.layers = sorted(set(options.layers)) or list(range(depth))
        self.shared_weights = self.agent.blocks[0].weights
        self.aligns = options.shared and options.align != "none"

    def feature_loss(self, tokens: Tensor, feature_map: Tensor) -> Tensor:
        """Eq. 6 of one layer: tokens (B, N, C) of the ViT's patches, the agent's map (B, C, h, w), a constant."""
        feature_map = feature_map.detach()
        if self.options.pooling == "2d":
            rows, columns = self.student.patch_embed.grid_size
            height, width = feature_map.shape[2:]
            grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))
            size = min(rows, height), min(columns, width)
            grid, feature_map = (F.adaptive_avg_pool2d(x, size) for x in (grid, feature_map))
            tokens = grid.flatten(2).transpose(1, 2)
        return feature_alignment_loss(tokens, feature_map.flatten(2).transpose(1, 2))

    def losses(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses "ce", "mutual" and "features" of the ViT, "agent_ce" and "agent_mutual" of the agent: Eq. 9's sum.

        images: (B, C, H, W). targets: (B,) int64, or (B, classes) probabilities.
        """
        options = self.options
        if self.aligns and torch.is_grad_enabled():
            self.shared_weights.part_ways()
        tokens, features = self.student.forward_intermediates(images, indices=self.layers, output_fmt="NLC")[0:2]
        maps, compared = self.agent.forward_intermediates(images, indices=self.layers)
        logits, answer = wide(self.student.forward_head(tokens)), wide(self.agent.forward_head(maps))
        decay = 1.0 - progress if options.decay == "linear" else 1.0
        mutual = options.mutual_weight * options.temperature**2
        alignment = sum(map(self.feature_loss, features, compared))
        return {
            "ce": options.label_weight * F.cross_entropy(logits, targets),
            "mutual": mutual * divergence(logits, answer.detach(), options.temperature).mean(),
            "features": options.feature_weight * decay * alignment,
            "agent_ce": options.label_weight * F.cross_entropy(answer, targets),
            "agent_mutual": mutual * divergence(answer, logits.detach(), options.temperature).mean(),
        }

    def backward(self, losses: dict[str, Tensor], accelerator) -> None:
        """One backward pass; of shared weights, the two gradients are averaged over processes, aligned and halved.

        Under accumulation the two are summed up apart and aligned once, at the step; clipping comes after.
        """
        if self.aligns and accelerator.is_fsdp2:
            raise RuntimeError("bootstrap: aligned gradients do not go together with FSDP; use DDP, or align=none")
        super().backward(losses, accelerator)
        if not (self.aligns and accelerator.sync_gradients):
            return
        pairs = list(self.shared_weights.pairs())
        if accelerator.num_processes > 1 and pairs:
            flat = torch.cat([agent.flatten() for _, agent in pairs])
            flat = accelerator.reduce(flat, reduction="mean")
            parts = flat.split([agent.numel() for _, agent in pairs])
            pairs = [(vit, part.view_as(agent)) for (vit, agent), part in zip(pairs, parts, strict=True)]
        with torch.no_grad():
            align_gradients(pairs, self.options.align)
        self.shared_weights.clear()


def _check(options: BootstrapOptions) -> None:
    for name, choices in {"align": ("tensor", "all", "none"), "form": ("res", "base"),
                          "pooling": ("sequence", "2d"), "decay": ("linear", "none")}.items():  # fmt: skip
        if getattr(options, name) not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {getattr(options, name)!r}")
    for name in ("label_weight", "mutual_weight", "feature_weight", "temperature"):
        value = getattr(options, name)
        if not math.isfinite(value) or value < 0 or (name == "temperature" and value == 0):
            bound = "above" if name == "temperature" else "of at least"
            raise ValueError(f"{name}: expected a finite number {bound} 0, got {value}")
