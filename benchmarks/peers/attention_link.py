"""Peers of `cls_attention_maps` and `attention_link_loss`: eager, compiled, and the whole attention matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness import Peer, Step
from fastib.reference import attention_link_loss_ref, cls_attention_maps_ref


@dataclass(frozen=True)
class Case:
    """One row of the table. sizes: B, H, N, D of "cls_attention"; B, M, C, S of "attention_link"."""

    op: str
    sizes: tuple[int, int, int, int]
    dtype: str
    mode: str  # forward | train: and gradients to all inputs
    masked: bool = False
    device: str = "cpu"
    repeated: bool = False  # timed in calls one after the other, with the inputs in the caches

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def names(self) -> str:
        return "BHND" if self.op == "cls_attention" else "BMCS"

    @property
    def results(self) -> tuple[str, ...]:
        gradients = "qk" if self.op == "cls_attention" else ("attn", "weight", "bias")
        return ("out", *(f"grad_{name}" for name in gradients)) if self.trains else ("out",)

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        sizes = "-".join(f"{name}{size}" for name, size in zip(self.names, self.sizes, strict=True))
        kind = "-masked" if self.masked else "-repeated" if self.repeated else ""
        return f"{self.device}-{self.mode}-{self.op}-{sizes}-{self.dtype}{kind}"

    def flops(self) -> float:
        """One product forward; two more backward. The same for every peer, masked or not."""
        a, b, c, d = self.sizes
        return (6 if self.trains else 2) * a * b * c * d

    def bytes(self) -> float:
        """Each input read once, each result written once."""
        a, b, c, d = self.sizes
        size = getattr(torch, self.dtype).itemsize
        if self.op == "cls_attention":
            return a * b * (c * d * (3 if self.trains else 1) + c) * size
        return a * (c + b * (2 if self.trains else 1)) * d * size

    def allowed(self) -> dict[str, float]:
        """Relative error that the gate lets pass, per result."""
        return dict.fromkeys(self.results, 2e-2 if self.dtype == "bfloat16" else 2e-5)


class Inputs:
    """Tensors of a case, drawn when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
        case = self.case
        dtype, generator = getattr(torch, case.dtype), torch.Generator(case.device).manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=case.device, generator=generator)

        if case.op == "cls_attention":
            B, H, N, D = case.sizes
            q, k = normal(B, H, D).to(dtype), normal(B, N, H, D).to(dtype).transpose(1, 2)
            leaves, grad_out, target, mask = [q, k], normal(B, H, N - 1).to(dtype), None, None
        else:
            B, M, C, S = case.sizes
            weight = normal(C, M).to(dtype).float()
            leaves = [normal(B, M, S).softmax(-1).to(dtype), weight, 0.01 * normal(C)]
            grad_out, target = torch.tensor(1.0, device=case.device), normal(B, C, S).to(dtype)
            mask = alpha_links(C, M, case.device) if case.masked else None
        return [leaf.requires_grad_(case.trains) for leaf in leaves], grad_out, target, mask

    @property
    def leaves(self) -> list[Tensor]:
        return self._drawn[0]

    def function(self, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`op` of the leaves alone."""
        _, _, target, mask = self._drawn
        if self.case.op == "cls_attention":
            return op
        return lambda *leaves: op(*leaves, target.to(leaves[0].dtype), mask=mask, reduction="sum")

    def step(self, function: Callable[..., Tensor], leaves: list[Tensor] | None = None) -> Step:
        grad_out = self._drawn[1]

        def step(checking: bool) -> tuple[Tensor, ...]:
            args = leaves or self.leaves
            if not self.case.trains:
                with torch.no_grad():
                    return (function(*args),)
            out = function(*args)
            return (out.detach(), *torch.autograd.grad(out, args, grad_out.to(out.dtype)))

        return step

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        self.__dict__.pop("_drawn", None)


def alpha_links(channels: int, maps: int, device: str) -> Tensor:
    """The paper's alpha-links of EfficientNet-B3's seven levels to twelve layers of six heads: 42 % of all."""
    mask = torch.zeros(channels, maps, dtype=torch.bool, device=device)
    levels = zip((24, 32, 48, 96, 136, 232, 384), (1, 1, 3, 4, 4, 6, 7), (3, 5, 5, 6, 6, 11, 12), strict=True)
    first = 0
    for width, low, high in levels:
        mask[first : first + width, 6 * (low - 1) : 6 * high] = True
        first += width
    return mask


def reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """The results in float64."""
    op = cls_attention_maps_ref if inputs.case.op == "cls_attention" else attention_link_loss_ref
    wide = [leaf.detach().double().requires_grad_(inputs.case.trains) for leaf in inputs.leaves]
    return inputs.step(inputs.function(op), wide)(True)


def whole_matrix(q: Tensor, k: Tensor) -> Tensor:
    """What a user gets who switches the fused attention off: all N rows, of which one is kept."""
    queries = q[:, :, None].expand(-1, -1, k.shape[2], -1)
    scores = queries * k.shape[3] ** -0.5 @ k.transpose(-2, -1)
    return scores[..., 1:].softmax(-1)[:, :, 0]


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""
    from fastib.ops import attention_link_loss, cls_attention_maps

    one_row = inputs.case.op == "cls_attention"
    op, ref = (
        (cls_attention_maps, cls_attention_maps_ref) if one_row else (attention_link_loss, attention_link_loss_ref)
    )

    def ours(*args, **options):
        return op(*args, backend=backend, **options)

    def compiled():
        return inputs.step(torch.compile(inputs.function(ref), dynamic=False, fullgraph=True))

    found = [
        Peer("fastib", lambda: inputs.step(inputs.function(ours))),
        Peer("eager", lambda: inputs.step(inputs.function(ref))),
        Peer("eager compiled", compiled, slow_to_build=True),
    ]
    if one_row:
        found.append(Peer("whole matrix", lambda: inputs.step(whole_matrix), note="all rows, as without fusion"))
    return found
