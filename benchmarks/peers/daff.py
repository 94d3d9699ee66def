"""Peers of `fastib.nn.DAFF`: its layers one by one, on channels_last and on contiguous maps, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Peer, Step
from fastib.nn import DAFF

RESULTS = ("out", "grad_x", "grad_conv2", "grad_norm1")


def allowed(dtype: str, trains: bool = True) -> dict[str, float]:
    """Relative error that the gate lets pass, per result."""
    error = 3e-2 if dtype in ("bfloat16", "float16") else 2e-5
    return dict.fromkeys(RESULTS if trains else RESULTS[:1], error)


@dataclass(frozen=True)
class Case:
    """One row of the table: shapes, element type, what is timed, and where."""

    B: int
    dim: int
    side: int  # of the square grid of patches
    dtype: str
    mode: str  # forward | train: and gradients to the input and all parameters; both with the statistics of the batch
    device: str = "cpu"

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        shape = f"B{self.B}-D{self.dim}-{self.side}x{self.side}"
        return f"{self.device}-{self.mode}-daff-{shape}-{self.dtype}"

    def flops(self) -> float:
        """Two products with a (dim, 4 dim) weight and nine taps, three times in training."""
        places = self.B * self.side**2
        return (3 if self.trains else 1) * 2 * places * 4 * self.dim * (2 * self.dim + 9)

    def bytes(self) -> float:
        """Input and output, and two maps of 4 dim between the products, written and read; twice that in training."""
        places = self.B * self.side**2
        return (2 if self.trains else 1) * places * self.dim * 18 * getattr(torch, self.dtype).itemsize


class Inputs:
    """The module, its input and a gradient of its output, drawn when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[DAFF, Tensor, Tensor]:
        case, generator = self.case, torch.Generator().manual_seed(7)
        module = DAFF(case.dim, grid_size=case.side)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        x, grad_out = (torch.randn(case.B, 1 + case.side**2, case.dim, generator=generator) for _ in range(2))
        dtype = getattr(torch, case.dtype)
        leaf = x.to(case.device, dtype).requires_grad_(case.trains)
        return module.to(case.device).train(), leaf, grad_out.to(case.device, dtype)

    @property
    def module(self) -> DAFF:
        return self._drawn[0]

    @property
    def x(self) -> Tensor:
        """(B, 1 + side^2, dim)."""
        return self._drawn[1]

    @property
    def grad_out(self) -> Tensor:
        return self._drawn[2]

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        self.__dict__.pop("_drawn", None)


def layers(module: DAFF, x: Tensor, contiguous: bool = False) -> Tensor:
    """The published layers on maps (B, C, gh, gw): views of the tokens, which are channels_last, or copies of them."""
    cls, maps = x[:, 0], x[:, 1:].unflatten(1, module.grid_size).permute(0, 3, 1, 2)
    if contiguous:
        maps = maps.contiguous()
    s = F.gelu(module.norm1(module.conv1(maps)))
    y = module.norm3(module.conv3(F.gelu(module.norm2(module.conv2(s))) + s))
    weight = module.expand(F.gelu(module.reduce(y.mean(dim=(2, 3)))))
    return torch.cat(((cls * weight).unsqueeze(1), y.flatten(2).transpose(1, 2)), dim=1)


def results(module: DAFF, out: Tensor, x: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """out and three gradients, of all that are computed."""
    parameters = list(module.parameters())
    grads = torch.autograd.grad(out, [x, *parameters], grad_out)
    named = dict(zip(map(id, parameters), grads[1:], strict=True))
    return out.detach(), grads[0], named[id(module.conv2.weight)], named[id(module.norm1.weight)]


def reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """What every gated peer must return, in float64."""
    module, x = copy.deepcopy(inputs.module).double(), inputs.x.detach().double().requires_grad_()
    if not inputs.case.trains:
        with torch.no_grad():
            return (layers(module, x),)
    return results(module, layers(module, x), x, inputs.grad_out.double())


def make_step(inputs: Inputs, function: Callable[[DAFF, Tensor], Tensor]) -> Step:
    """A step of a peer: forward, and in training all gradients; under autocast where the input is not float32."""

    def forward() -> Tensor:
        if inputs.case.dtype == "float32":
            return function(inputs.module, inputs.x)
        with torch.autocast(inputs.case.device, dtype=getattr(torch, inputs.case.dtype)):
            return function(inputs.module, inputs.x)

    def step(checking: bool) -> tuple[Tensor, ...]:
        if not inputs.case.trains:
            with torch.no_grad():
                return (forward(),)
        out = forward()
        return results(inputs.module, out, inputs.x, inputs.grad_out.to(out.dtype))

    return step


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""

    def ours(module: DAFF, x: Tensor) -> Tensor:
        module.backend = backend
        return module(x)

    def contiguous(module: DAFF, x: Tensor) -> Tensor:
        return layers(module, x, contiguous=True)

    def build() -> Step:
        return make_step(inputs, torch.compile(layers, dynamic=False))

    return [
        Peer("fastib", lambda: make_step(inputs, ours)),
        Peer("eager", lambda: make_step(inputs, layers), note="channels_last"),
        Peer("eager contiguous", lambda: make_step(inputs, contiguous)),
        Peer("eager compiled", build, slow_to_build=True),
    ]
