"""Peers of the linear layer's own products: PyTorch's, as a linear layer and as the 1 x 1 convolution of DAFF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Peer, Step

RESULTS = ("out", "grad_x", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Case:
    """One row of the table: shapes and what is timed, in float32."""

    B: int
    side: int  # of the square grid of places
    inner: int  # channels of x
    outer: int  # of the result
    mode: str  # forward | train: and all gradients

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        return f"cpu-{self.mode}-linear-B{self.B}-{self.side}x{self.side}-I{self.inner}-O{self.outer}-float32"

    def allowed(self) -> dict[str, float]:
        """Relative error that the gate lets pass, per result."""
        return dict.fromkeys(RESULTS if self.trains else RESULTS[:1], 1e-5)

    def flops(self) -> float:
        """One product, three in training."""
        return (3 if self.trains else 1) * 2 * self.B * self.side**2 * self.inner * self.outer

    def bytes(self) -> float:
        """x read and the result written; in training both again, and their gradients."""
        return (3 if self.trains else 1) * 4 * self.B * self.side**2 * (self.inner + self.outer)


class Inputs:
    """Tensors of a case, drawn when first asked for: x is what follows the class token, as in DAFF."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[Tensor, ...]:
        case, generator = self.case, torch.Generator().manual_seed(7)
        x = torch.randn(case.B, 1 + case.side**2, case.inner, generator=generator)[:, 1:]
        weight = torch.randn(case.outer, case.inner, generator=generator) * case.inner**-0.5
        leaves = (t.requires_grad_(case.trains) for t in (x, weight, torch.randn(case.outer, generator=generator)))
        return *leaves, torch.randn(case.B, case.side**2, case.outer, generator=generator)

    def step(self, function: Callable[..., Tensor]) -> Step:
        def step(checking: bool) -> tuple[Tensor, ...]:
            *leaves, grad = self._drawn
            if not self.case.trains:
                with torch.no_grad():
                    return (function(*leaves),)
            out = function(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad))

        return step

    def reference(self) -> tuple[Tensor, ...]:
        """The results in float64."""
        *leaves, grad = (t.detach().double() for t in self._drawn)
        leaves = [t.requires_grad_(self.case.trains) for t in leaves]
        out = F.linear(*leaves)
        return (out.detach(), *(torch.autograd.grad(out, leaves, grad) if self.case.trains else ()))

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        self.__dict__.pop("_drawn", None)


def peers(inputs: Inputs) -> list[Peer]:
    """Every peer of a case, ours first."""
    from fastib.ops.linear import linear

    side = inputs.case.side

    def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        maps = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # channels_last
        return F.conv2d(maps, weight[:, :, None, None], bias).flatten(2).transpose(1, 2)

    def compiled() -> Callable[..., Tensor]:
        return torch.compile(F.linear, dynamic=False, fullgraph=True)

    return [
        Peer("fastib", lambda: inputs.step(linear)),
        Peer("linear", lambda: inputs.step(F.linear)),
        Peer("linear compiled", lambda: inputs.step(compiled()), slow_to_build=True),
        Peer("1 x 1 convolution", lambda: inputs.step(convolution), note="channels_last"),
    ]
