"""Peers of `generalized_conv`: the shift in eager and compiled, a dense convolution, dense matrices of places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Peer, Step, Unavailable
from fastib.reference.generalized_conv import (
    generalized_conv_ref,
    generalized_conv_shift_ref,
    materialized_kernel,
    taps,
)

RESULTS = ("out", "grad_x", "grad_w_v", "grad_w_o", "grad_bias")


@dataclass(frozen=True)
class Case:
    """One row of the table. part: "conv", the whole operator, or "shift", what of it is no matrix product."""

    B: int
    C: int
    H: int
    side: int
    dtype: str
    mode: str  # forward | train: and gradients to all inputs
    layout: str = "channels_last"  # or contiguous
    part: str = "conv"
    device: str = "cpu"

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        op = "generalized_conv" if self.part == "conv" else "generalized_conv_shift"
        shape = f"B{self.B}-C{self.C}-H{self.H}-{self.side}x{self.side}"
        return f"{self.device}-{self.mode}-{op}-{shape}-{self.dtype}-{self.layout}"

    def allowed(self) -> dict[str, float]:
        """Relative error that the gate lets pass, per result."""
        if self.part == "shift":
            return dict.fromkeys(RESULTS[: 1 + self.trains], 1e-9)  # nothing is computed
        error = 2e-2 if self.dtype in ("bfloat16", "float16") else 2e-5
        return dict.fromkeys(RESULTS if self.trains else RESULTS[:1], error)

    def flops(self) -> float:
        """Two products of all pixels forward, four more backward. The same for every peer. Of the shift: a token 1."""
        if self.part == "shift":
            return 1.0
        return (12 if self.trains else 4) * self.B * self.side**2 * self.C**2

    def bytes(self) -> float:
        """x read and the result written once in each direction, and the weights."""
        images = 2 * self.B * self.C * self.side**2 * (2 if self.trains else 1)
        weights = 0 if self.part == "shift" else 2 * self.C**2 * (3 if self.trains else 1)
        return (images + weights) * getattr(torch, self.dtype).itemsize


class Inputs:
    """Tensors of a case, drawn when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[list[Tensor], Tensor]:
        case = self.case
        options = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(7)}
        last = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        dtype = getattr(torch, case.dtype)
        x, grad_out = (
            torch.randn(case.B, case.C, case.side, case.side, **options).to(dtype).contiguous(memory_format=last)
            for _ in range(2)
        )
        weights = [torch.randn(case.C, case.C, **options).to(dtype) * case.C**-0.5 for _ in range(2)]
        leaves = [x] if case.part == "shift" else [x, *weights, torch.randn(case.C, **options).to(dtype)]
        return [leaf.requires_grad_(case.trains) for leaf in leaves], grad_out

    @property
    def leaves(self) -> list[Tensor]:
        """x (B, C, side, side); of "conv" also w_v, w_o and bias."""
        return self._drawn[0]

    def step(self, function: Callable[..., Tensor], leaves: list[Tensor] | None = None) -> Step:
        def step(checking: bool) -> tuple[Tensor, ...]:
            args = leaves or self.leaves
            if not self.case.trains:
                with torch.no_grad():
                    return (function(*args),)
            out = function(*args)
            return (out.detach(), *torch.autograd.grad(out, args, self._drawn[1].to(out.dtype)))

        return step

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        self.__dict__.pop("_drawn", None)


def dense_convolution(heads: int) -> Callable[..., Tensor]:
    """The kernel of all taps made from the weights in each step, for `conv2d`."""

    def function(x: Tensor, w_v: Tensor, w_o: Tensor, bias: Tensor) -> Tensor:
        kernel = materialized_kernel(w_v, w_o, heads).contiguous(
            memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
        )
        return F.conv2d(x, kernel, bias, padding=(kernel.shape[2] - 1) // 2)

    return function


def dense_matrices(heads: int, side: int, like: Tensor) -> Callable[..., Tensor]:
    """What the published code does: every tap's product, then a dense matrix of zeros and ones over all places."""
    places = torch.arange(side * side, device=like.device)
    row, column = places // side, places % side
    phi = torch.stack([
        (row[None] == row[:, None] + down) & (column[None] == column[:, None] + right) for down, right in taps(heads)
    ]).to(like.dtype)  # fmt: skip

    def function(x: Tensor, w_v: Tensor, w_o: Tensor, bias: Tensor) -> Tensor:
        weight = torch.einsum("ohd,hdc->hoc", w_o.unflatten(1, (heads, -1)), w_v.unflatten(0, (heads, -1)))
        projected = torch.einsum("hoc,bcn->bhno", weight, x.flatten(2))
        out = torch.einsum("hmn,bhno->bom", phi, projected) + bias[:, None]
        return out.unflatten(2, (side, side))

    return function


def reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """The results in float64; of the shift, which computes nothing, in its own dtype."""
    case = inputs.case
    if case.part == "shift":
        return inputs.step(lambda x: generalized_conv_shift_ref(x, case.H))(True)
    wide = [leaf.detach().double().requires_grad_(case.trains) for leaf in inputs.leaves]
    return inputs.step(lambda *t: generalized_conv_ref(*t, case.H), wide)(True)


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""
    from fastib.ops import generalized_conv

    case = inputs.case

    def of(make: Callable[[], Callable[..., Tensor]]) -> Callable[[], Step]:
        return lambda: inputs.step(make())

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False, fullgraph=True)

    if case.part == "shift":

        def eager(x):
            return generalized_conv_shift_ref(x, case.H)

        def shift(x):
            if backend == "reference":
                raise Unavailable("the reference is the peer")
            return torch.ops.fastib.generalized_conv_shift(x, case.H, False)

        return [
            Peer("fastib", of(lambda: shift)),
            Peer("eager", of(lambda: eager)),
            Peer("eager compiled", of(lambda: compiled(eager)), slow_to_build=True),
            Peer("copy", of(lambda: lambda x: x.clone()), gated=False, note="moves nothing to another place"),
        ]

    def eager(*tensors):
        return generalized_conv_ref(*tensors, case.H)

    def phi():
        if case.side > 14 and case.device == "cpu":
            raise Unavailable("its dense matrices of all places take too long")
        return dense_matrices(case.H, case.side, inputs.leaves[0])

    return [
        Peer("fastib", of(lambda: lambda *t: generalized_conv(*t, case.H, backend=backend))),
        Peer("eager", of(lambda: eager)),
        Peer("eager compiled", of(lambda: compiled(eager)), slow_to_build=True),
        Peer("dense conv", of(lambda: dense_convolution(case.H))),
        Peer("dense phi", of(phi), note="the published way"),
    ]
