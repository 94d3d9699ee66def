"""Peers of `involution`: unfolding, a sum of shifted products, both compiled; a depthwise convolution as a floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Peer, Step
from fastib.reference.involution import involution_ref

RESULTS = ("out", "grad_x", "grad_weight")
GROUP = 16


def allowed(dtype: str, trains: bool = True) -> dict[str, float]:
    """Relative error that the gate lets pass, per result."""
    error = 2e-2 if dtype in ("bfloat16", "float16") else 2e-5
    return dict.fromkeys(RESULTS if trains else RESULTS[:1], error)


@dataclass(frozen=True)
class Case:
    """One row of the table: shapes, element type, memory format, what is timed, and where."""

    B: int
    C: int
    side: int
    dtype: str
    mode: str  # forward | train: and gradients to both inputs
    K: int = 7
    stride: int = 1
    layout: str = "contiguous"  # or channels_last
    device: str = "cpu"
    repeated: bool = False  # timed in calls one after the other, the threads awake

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def out_side(self) -> int:
        return -(-self.side // self.stride)

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        step = f"-stride{self.stride}" if self.stride > 1 else ""
        layout = "" if self.layout == "contiguous" else f"-{self.layout}"
        shape = f"B{self.B}-C{self.C}-{self.side}x{self.side}-K{self.K}"
        repeated = "-repeated" if self.repeated else ""
        return f"{self.device}-{self.mode}-involution-{shape}-{self.dtype}{step}{layout}{repeated}"

    def flops(self) -> float:
        """A multiplication and an addition per tap and result, three times in training. The same for every peer."""
        return (6 if self.trains else 2) * self.B * self.C * self.K**2 * self.out_side**2

    def bytes(self) -> float:
        """Each input read once, each result written once: x, weight, out; then grad_out, x, weight, two gradients."""
        x, out = self.C * self.side**2, self.C * self.out_side**2
        weight = self.C // GROUP * self.K**2 * self.out_side**2
        elements = (3 * x + 2 * out + 3 * weight) if self.trains else (x + out + weight)
        return self.B * elements * getattr(torch, self.dtype).itemsize


class Inputs:
    """Tensors of a case, drawn when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[list[Tensor], Tensor]:
        case = self.case
        options = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(7)}
        groups = case.C // GROUP
        x = torch.randn(case.B, case.C, case.side, case.side, **options)
        weight = torch.randn(case.B, groups * case.K**2, case.out_side, case.out_side, **options)
        grad_out = torch.randn(case.B, case.C, case.out_side, case.out_side, **options)
        last = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        x, weight, grad_out = (
            t.to(getattr(torch, case.dtype)).contiguous(memory_format=last) for t in (x, weight, grad_out)
        )
        leaves = [x, weight.unflatten(1, (groups, case.K, case.K))]
        return [leaf.detach().requires_grad_(case.trains) for leaf in leaves], grad_out

    @property
    def leaves(self) -> list[Tensor]:
        """x (B, C, side, side) and weight (B, G, K, K, out_side, out_side)."""
        return self._drawn[0]

    @property
    def grad_out(self) -> Tensor:
        """(B, C, out_side, out_side)."""
        return self._drawn[1]

    @cached_property
    def one_kernel(self) -> Tensor:
        """A kernel per channel for all places, as a depthwise convolution has."""
        case = self.case
        kernel = torch.randn(case.C, 1, case.K, case.K, device=case.device).to(getattr(torch, case.dtype))
        return kernel.requires_grad_(case.trains)

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        for name in ("_drawn", "one_kernel"):
            self.__dict__.pop(name, None)


def reference(inputs: Inputs, images: int = 4) -> tuple[Tensor, ...]:
    """out and, in training, both gradients, in float64, a few images at a time to bound the memory."""
    case, parts = inputs.case, []
    for begin in range(0, case.B, images):
        part = slice(begin, begin + images)
        x, weight = (leaf.detach()[part].double().requires_grad_(True) for leaf in inputs.leaves)
        out = involution_ref(x, weight, stride=case.stride)
        grads = torch.autograd.grad(out, (x, weight), inputs.grad_out[part].double()) if case.trains else ()
        parts.append((out.detach(), *grads))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


Function = Callable[[Tensor, Tensor], Tensor]


def make_step(inputs: Inputs, function: Function, leaves: list[Tensor] | None = None) -> Step:
    """A step of a peer: forward, and in training the gradients to its inputs."""

    def step(checking: bool) -> tuple[Tensor, ...]:
        args = leaves or inputs.leaves
        if not inputs.case.trains:
            with torch.no_grad():
                return (function(*args),)
        out = function(*args)
        return (out.detach(), *torch.autograd.grad(out, args, inputs.grad_out))

    return step


def shifted(stride: int) -> Function:
    """A product for each tap with x shifted by it, summed up: no unfolded copy, K^2 passes where nothing fuses them."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        batch, groups, kernel, _, rows, columns = weight.shape
        padded = F.pad(x, (kernel // 2,) * 4).unflatten(1, (groups, -1))
        out = 0
        for u in range(kernel):
            for v in range(kernel):
                down = slice(u, u + (rows - 1) * stride + 1, stride)
                right = slice(v, v + (columns - 1) * stride + 1, stride)
                out = out + weight[:, :, None, u, v] * padded[..., down, right]
        return out.reshape(batch, -1, rows, columns)

    return function


def compiled(function: Function) -> Function:
    """torch.compile for fixed shapes, as one graph."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""
    from fastib.ops import involution

    case, stride = inputs.case, inputs.case.stride

    def ours(x, weight):
        return involution(x, weight, stride=stride, backend=backend)

    def eager(x, weight):
        return involution_ref(x, weight, stride=stride)

    def depthwise(x, kernel):
        return F.conv2d(x, kernel, stride=stride, padding=case.K // 2, groups=case.C)

    def slow(name: str, function: Function) -> Peer:
        return Peer(name, lambda: make_step(inputs, compiled(function)), slow_to_build=True)

    return [
        Peer("fastib", lambda: make_step(inputs, ours)),
        Peer("eager", lambda: make_step(inputs, eager)),
        slow("eager compiled", eager),
        Peer("shifted", lambda: make_step(inputs, shifted(stride))),
        slow("shifted compiled", shifted(stride)),
        Peer(
            "depthwise conv", lambda: make_step(inputs, depthwise, [inputs.leaves[0], inputs.one_kernel]),
            gated=False, note="one kernel for all places: reads no kernel map",
        ),
    ]  # fmt: skip
