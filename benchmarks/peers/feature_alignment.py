"""Peers of `feature_alignment_loss`: the reference, `layer_norm` with `mse_loss`, and both compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Peer, Step
from fastib.reference.feature_alignment import feature_alignment_loss_ref

RESULTS = ("loss", "grad_student")


@dataclass(frozen=True)
class Case:
    """One row of the table: shapes, element type, what is timed, and where."""

    B: int
    N: int  # tokens of the student
    M: int  # of the teacher
    C: int
    dtype: str
    mode: str  # forward | train: and the gradient to the student
    device: str = "cpu"

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        return f"{self.device}-{self.mode}-feature_alignment-B{self.B}-N{self.N}-M{self.M}-C{self.C}-{self.dtype}"

    def allowed(self) -> dict[str, float]:
        """Relative error that the gate lets pass, per result."""
        error = 2e-2 if self.dtype in ("bfloat16", "float16") else 2e-5
        return dict.fromkeys(RESULTS if self.trains else RESULTS[:1], error)

    def bytes(self) -> float:
        """Both inputs read; in training the gradient's direction written and read, and the gradient written."""
        rows = self.N + self.M + (2 * min(self.N, self.M) + self.N if self.trains else 0)
        return self.B * rows * self.C * getattr(torch, self.dtype).itemsize


class Inputs:
    """Tensors of a case, drawn when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        case = self.case
        options = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(7)}
        student, teacher = (
            torch.randn(case.B, tokens, case.C, **options).to(getattr(torch, case.dtype)) for tokens in (case.N, case.M)
        )
        return student.requires_grad_(case.trains), teacher

    def step(self, function: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def step(checking: bool) -> tuple[Tensor, ...]:
            student, teacher = self._drawn
            if not self.case.trains:
                with torch.no_grad():
                    return (function(student, teacher),)
            loss = function(student, teacher)
            return (loss.detach(), *torch.autograd.grad(loss, student))

        return step

    def reference(self) -> tuple[Tensor, ...]:
        """The results in float64."""
        student, teacher = (t.detach().double() for t in self._drawn)
        student.requires_grad_(self.case.trains)
        loss = feature_alignment_loss_ref(student, teacher)
        return (loss.detach(), *(torch.autograd.grad(loss, student) if self.case.trains else ()))

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        self.__dict__.pop("_drawn", None)


def two_norms(student: Tensor, teacher: Tensor) -> Tensor:
    """Averages, `layer_norm` and `mse_loss`: a normed token is sqrt(C) times the unit one, so the mean is the loss."""
    tokens, channels = min(student.shape[1], teacher.shape[1]), student.shape[2]
    units = [
        F.layer_norm(x.unflatten(1, (tokens, -1)).mean(2) if x.shape[1] > tokens else x, (channels,))
        for x in (student, teacher)
    ]
    return F.mse_loss(units[0].float(), units[1].float())


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""
    from fastib.ops import feature_alignment_loss

    def of(make: Callable[[], Callable[..., Tensor]]) -> Callable[[], Step]:
        return lambda: inputs.step(make())

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False, fullgraph=True)

    return [
        Peer("fastib", of(lambda: lambda s, t: feature_alignment_loss(s, t, backend=backend))),
        Peer("eager", of(lambda: feature_alignment_loss_ref)),
        Peer("eager compiled", of(lambda: compiled(feature_alignment_loss_ref)), slow_to_build=True),
        Peer("two norms", of(lambda: two_norms), note="layer_norm and mse_loss"),
        Peer("two norms compiled", of(lambda: compiled(two_norms)), slow_to_build=True),
    ]
