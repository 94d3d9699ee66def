"""Co-advise: a vision transformer taught by small teachers of different bias (Ren et al., CVPR 2022, Sec. 3.3)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastib.methods.base import LoadTeacher, Method, MethodOptions, register_method, wide

__all__ = ["CoAdvise", "CoAdviseOptions", "divergence"]


@dataclass
class CoAdviseOptions(MethodOptions):
    """Options of Co-advise; the defaults are the paper's values.

    Attributes:
        teachers: one per token, in the order of the student's tokens: "timm:NAME", "run:PATH" or a checkpoint path.
        lambdas: weights of Eq. 1, first the labels', then one per teacher; empty: all 1.
        taus: temperatures of Eq. 1, one per teacher; empty: all 1.
    """

    teachers: list[str] = field(default_factory=list)
    lambdas: list[float] = field(default_factory=list)
    taus: list[float] = field(default_factory=list)


def divergence(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student / tau)) per image (B,), of logits (B, classes), in float32 at least.

    The teacher is the target distribution, as in the published code; Eq. 1 writes its arguments the other way round.
    """
    log_student = F.log_softmax(wide(student) / tau, dim=1)
    log_teacher = F.log_softmax(wide(teacher) / tau, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


@register_method("co_advise")
class CoAdvise(Method):
    """Eq. 1: L = lambda_0 CE(z_class, y) + sum_i lambda_i tau_i^2 KL(softmax(z_ti / tau_i) || softmax(z_i / tau_i)).

    z_class and z_i are the logits of the student's class token and of its i-th teacher's token (`CiT.token_logits`),
    z_ti those of the i-th teacher for the same augmented and mixed images; both terms are means over the batch. A
    student without such tokens answers to the labels and to all teachers with its one output (Tables 4 and 7).
    """

    Options = CoAdviseOptions

    def __init__(self, options: CoAdviseOptions, student: nn.Module, num_classes: int, load_teacher: LoadTeacher):
        super().__init__(options, student, num_classes, load_teacher)
        count = len(options.teachers)
        if count == 0:
            raise ValueError("teachers: Co-advise needs some, e.g. teachers=[timm:regnety_006,run:PATH]")
        self.has_tokens = hasattr(student, "token_logits")
        if self.has_tokens and student.distill_tokens != count:
            raise ValueError(f"teachers: expected one per token of the student ({student.distill_tokens}), got {count}")
        self.lambdas = _numbers("lambdas", options.lambdas, count + 1, positive=False)
        self.taus = _numbers("taus", options.taus, count, positive=True)
        for i, source in enumerate(options.teachers, 1):
            teacher = self.freeze(f"teacher_{i}", load_teacher(source))
            classes = getattr(teacher, "num_classes", num_classes)
            if classes != num_classes:
                raise ValueError(f"teachers: expected {num_classes} classes, got {classes} from {source}")

    def _student_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, classes) that answer to the labels and to each teacher."""
        if self.has_tokens:
            return self.student.token_logits(images)
        return (self.student(images),) * (1 + len(self.frozen))

    def losses(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Weighted losses "cls", "distill_1", "distill_2", ..., whose sum is Eq. 1.

        images: (B, C, H, W). targets: (B,) int64, or (B, classes) probabilities.
        """
        logits, *answers = self._student_logits(images)
        losses = {"cls": self.lambdas[0] * F.cross_entropy(wide(logits), targets)}
        terms = zip(self.lambdas[1:], self.taus, answers, self.frozen.values(), strict=True)
        for i, (weight, tau, answer, teacher) in enumerate(terms, 1):
            if weight == 0:  # the teacher is not asked; DistributedDataParallel waits for a gradient all the same
                losses[f"distill_{i}"] = 0.0 * wide(answer).sum()
                continue
            with torch.no_grad():
                target = teacher(images)
            losses[f"distill_{i}"] = weight * tau**2 * divergence(answer, target, tau).mean()
        return losses

    def measure(self, images: Tensor, targets: Tensor) -> dict[tuple[str, str, str], Tensor]:
        """Table 5: each token's divergence (tau 1) from each teacher, and the accuracy of each in percent.

        And the divergence once more where each image is mixed, half and half, with the one before it in its batch: on
        clean images the most confident token may be the nearest to all teachers.
        """
        names = [f"{i} {source}" for i, source in enumerate(self.options.teachers, 1)]
        rows = ["class token", *(f"token {name}" for name in names)] if self.has_tokens else ["student"]
        values = {}
        for table, x in (("divergence", images), ("divergence, mixed images", (images + images.roll(1, 0)) / 2)):
            answers = dict(zip(rows, self._student_logits(x), strict=False))
            teachers = dict(zip(names, (teacher(x) for teacher in self.frozen.values()), strict=True))
            for row, answer in answers.items():
                for name, teacher in teachers.items():
                    values[table, row, f"KL from {name}"] = divergence(answer, teacher)
            if x is images:
                values |= {(table, row, "top1"): _correct(answer, targets) for row, answer in answers.items()}
                values |= {("teachers", name, "top1"): _correct(t, targets) for name, t in teachers.items()}
        return values


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return 100.0 * (logits.argmax(dim=1) == targets)


def _numbers(name: str, values: list[float], count: int, positive: bool) -> list[float]:
    """`values`, or ones; ValueError where they are too many or too few, or negative, or not `positive`."""
    if values and len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {len(values)}")
    for value in values:
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError(f"{name}: expected numbers {'above' if positive else 'of at least'} 0, got {value}")
    return list(values) or [1.0] * count
