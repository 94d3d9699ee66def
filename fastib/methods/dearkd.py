"""DearKD: early knowledge distillation from a CNN, then training without it (Chen et al., CVPR 2022, Sec. 3)."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastib.methods.base import LoadTeacher, Method, MethodOptions, register_method, wide
from fastib.models.dearkd import distillation_outputs
from fastib.nn.aligner import Aligner

__all__ = ["DearKD", "DearKDOptions"]


@dataclass
class DearKDOptions(MethodOptions):
    """Options of DearKD. Where the paper gives no value, the default is ours and its line says so.

    Attributes:
        teacher: the CNN: "timm:NAME", "run:PATH" or a checkpoint path.
        alpha: weight of the class token's cross-entropy in Eq. 6, the teacher's has 1 - alpha (ours: DeiT's 0.5).
        beta: weight of the hidden loss in Eq. 6 (ours: 1).
        stage_one_share: share of the run in stage I (250 of 300 epochs).
        stage_two: "ce" is Eq. 7, the cross-entropy alone; "ramp" is Eq. 6 with beta 0 and alpha rising linearly to 1,
            which App. C uses for 300 epochs.
        student_blocks: blocks whose content tokens are aligned (ours: spread over the MHCA blocks).
        teacher_stages: for each of these blocks the index of the teacher's stage in its `feature_info` (ours: the three
            stages behind the stem of a RegNet or a ResNet).
    """

    teacher: str = ""
    alpha: float = 0.5
    beta: float = 1.0
    stage_one_share: float = 250 / 300
    stage_two: str = "ce"
    student_blocks: list[int] = field(default_factory=lambda: [1, 4, 7])
    teacher_stages: list[int] = field(default_factory=lambda: [1, 2, 3])


@torch.no_grad()
def teacher_outputs(teacher: nn.Module, images: Tensor, stages: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (B, classes) and the maps (B, C, h, w) of `stages`, in one forward pass of any timm model."""
    order = sorted(set(stages))
    if not order:
        return teacher(images), {}
    last, maps = teacher.forward_intermediates(images, indices=order)
    return teacher.forward_head(last), dict(zip(order, maps, strict=True))


@register_method("dearkd")
class DearKD(Method):
    """Two stages of training a vision transformer with a CNN teacher.

    Stage I, Eq. 6: L = alpha CE(cls, y) + (1 - alpha) CE(pooled, argmax teacher) + beta MSE(aligner(H_S), H_T), where
    `pooled` is the student's head on its mean content token and the last term is averaged over the pairs of student
    block and teacher stage. Stage II: L = CE(cls, y) (Eq. 7), or App. C's variant.
    """

    Options = DearKDOptions

    def __init__(self, options: DearKDOptions, student: nn.Module, num_classes: int, load_teacher: LoadTeacher):
        super().__init__(options, student, num_classes, load_teacher)
        _check(options, student)
        self.pairs = list(zip(options.student_blocks, options.teacher_stages, strict=True)) if options.beta > 0 else []
        teacher = self.freeze("teacher", load_teacher(options.teacher))
        channels = _stage_channels(teacher, num_classes, [stage for _, stage in self.pairs])
        self.aligners = nn.ModuleList(Aligner(student.embed_dim, c) for c in channels)

    def alpha_at(self, progress: float) -> float:
        """Weight of the class token's cross-entropy at `progress` in [0, 1] of the run."""
        start = self.options.stage_one_share
        if progress < start:
            return self.options.alpha
        if self.options.stage_two == "ce":
            return 1.0
        ramp = (progress - start) / (1 - start) if start < 1 else 1.0
        return self.options.alpha + (1 - self.options.alpha) * ramp

    def losses(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Weighted losses "cls", "distill" and "hidden", whose sum is Eq. 6 or 7; all but the first may be absent.

        images: (B, C, H, W). targets: (B,) int64, or (B, classes) probabilities.
        """
        stage_one = progress < self.options.stage_one_share
        if not stage_one and self.options.stage_two == "ce":
            return {"cls": F.cross_entropy(wide(self.student(images)), targets), **self._idle()}
        pairs = self.pairs if stage_one else []
        alpha = self.alpha_at(progress)
        logits, pooled, tokens = distillation_outputs(self.student, images, [block for block, _ in pairs])
        teacher_logits, maps = teacher_outputs(self.frozen["teacher"], images, [stage for _, stage in pairs])
        losses = {
            "cls": alpha * F.cross_entropy(wide(logits), targets),
            "distill": (1 - alpha) * F.cross_entropy(wide(pooled), teacher_logits.argmax(dim=1)),
        }
        if not pairs:
            return {**losses, **self._idle()}
        grid = self.student.patch_embed.dynamic_feat_size(images.shape[-2:])
        hidden = [
            F.mse_loss(wide(aligner(tokens[block], grid, maps[stage].shape[-2:])), wide(maps[stage]))
            for aligner, (block, stage) in zip(self.aligners, pairs, strict=True)
        ]
        losses["hidden"] = self.options.beta * torch.stack(hidden).mean()
        return losses

    def _idle(self) -> dict[str, Tensor]:
        # A zero that reaches the idle aligners, since DistributedDataParallel waits for every parameter's gradient.
        parameters = list(self.aligners.parameters())
        return {"hidden": 0.0 * sum(p.sum() for p in parameters)} if parameters else {}


def _stage_channels(teacher: nn.Module, num_classes: int, stages: list[int]) -> list[int]:
    """Channels of each stage's map; ValueError where the teacher does not fit."""
    missing = [name for name in ("feature_info", "forward_intermediates", "forward_head") if not hasattr(teacher, name)]
    if missing:
        raise ValueError(f"teacher: expected a timm model, but {type(teacher).__name__} has no {', '.join(missing)}")
    classes = getattr(teacher, "num_classes", num_classes)
    if classes != num_classes:
        raise ValueError(f"teacher: expected {num_classes} classes, got {classes}")
    for stage in stages:
        if not 0 <= stage < len(teacher.feature_info):
            raise ValueError(f"teacher_stages: expected indices in [0, {len(teacher.feature_info) - 1}], got {stage}")
    return [teacher.feature_info[stage]["num_chs"] for stage in stages]


def _check(options: DearKDOptions, student: nn.Module) -> None:
    if not options.teacher:
        raise ValueError("teacher: DearKD needs a CNN, e.g. teacher=timm:regnety_160 or teacher=run:PATH")
    for name in ("alpha", "stage_one_share"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(options, name)}")
    if not options.beta >= 0:
        raise ValueError(f"beta: expected a number of at least 0, got {options.beta}")
    if options.stage_two not in ("ce", "ramp"):
        raise ValueError(f"stage_two: expected 'ce' or 'ramp', got {options.stage_two!r}")
    if len(options.student_blocks) != len(options.teacher_stages):
        raise ValueError(
            f"teacher_stages: expected one per student block ({len(options.student_blocks)}), "
            f"got {len(options.teacher_stages)}"
        )
    if options.beta > 0 and not options.student_blocks:
        raise ValueError("student_blocks: expected at least one block, or beta 0")
    if not getattr(student, "has_class_token", False):
        raise ValueError(f"student: expected a timm VisionTransformer with a class token, got {type(student).__name__}")
    depth = len(student.blocks)
    outside = [block for block in options.student_blocks if not 0 <= block < depth]
    if outside and options.beta > 0:
        raise ValueError(f"student_blocks: expected indices in [0, {depth - 1}], got {outside[0]}")
