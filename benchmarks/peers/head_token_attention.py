"""Peers of `head_token_attention`: eager, compiled, scaled_dot_product_attention on joined tokens and without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Peer, Step
from fastib.reference.head_token_attention import head_token_attention_ref

RESULTS = ("out", "grad_q", "grad_k", "grad_v", "grad_q_extra", "grad_k_extra", "grad_v_extra")


def allowed(dtype: str, trains: bool = True) -> dict[str, float]:
    """Relative error that the gate lets pass, per result."""
    return dict.fromkeys(RESULTS if trains else RESULTS[:1], 2e-2 if dtype in ("bfloat16", "float16") else 2e-5)


@dataclass(frozen=True)
class Case:
    """One row of the table: shapes, element type, what is timed, and where."""

    B: int
    H: int
    N: int
    T: int
    D: int
    dtype: str
    mode: str  # forward | train: and gradients to all six inputs
    device: str = "cpu"

    @property
    def trains(self) -> bool:
        return self.mode != "forward"

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        shape = f"B{self.B}-H{self.H}-N{self.N}-T{self.T}-D{self.D}"
        return f"{self.device}-{self.mode}-head_token-{shape}-{self.dtype}"

    def flops(self) -> float:
        """Two products forward; five backward, of which one is recomputed. The same count for every peer."""
        return (14 if self.trains else 4) * self.B * self.H * (self.N + self.T) ** 2 * self.D

    def bytes(self) -> float:
        """Each input read once and each result written once: q, k, v, out; then q, k, v, out, and four gradients."""
        tensors = 12 if self.trains else 4
        return tensors * self.B * self.H * (self.N + self.T) * self.D * getattr(torch, self.dtype).itemsize


class Inputs:
    """Tensors of a case, drawn when first asked for: views of packed projections, as the module has them."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[list[Tensor], Tensor]:
        case = self.case
        options = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(7)}

        def normal(*shape):
            return torch.randn(*shape, **options).to(getattr(torch, case.dtype))

        leaves = [
            t.detach().requires_grad_(case.trains)
            for tokens in (case.N, case.T)
            for t in normal(case.B, tokens, 3, case.H, case.D).permute(2, 0, 3, 1, 4).unbind(0)
        ]
        return leaves, normal(case.B, case.N, case.H, case.D).transpose(1, 2)

    @property
    def leaves(self) -> list[Tensor]:
        """q, k, v (B, H, N, D), and those of the extra tokens (B, H, T, D)."""
        return self._drawn[0]

    @property
    def grad_out(self) -> Tensor:
        """(B, H, N, D)."""
        return self._drawn[1]

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        self.__dict__.pop("_drawn", None)


def reference(inputs: Inputs, images: int = 8) -> tuple[Tensor, ...]:
    """out and, in training, the six gradients, in float64, a few images at a time to bound the memory."""
    case, parts = inputs.case, []
    for begin in range(0, case.B, images):
        part = slice(begin, begin + images)
        leaves = [leaf.detach()[part].double().requires_grad_(True) for leaf in inputs.leaves]
        out = head_token_attention_ref(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs.grad_out[part].double()) if case.trains else ()
        parts.append((out.detach(), *grads))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


Attention = Callable[..., Tensor]  # (q, k, v, q_extra, k_extra, v_extra) -> out


def make_step(inputs: Inputs, attention: Attention, leaves: int = 6) -> Step:
    """leaves: how many of the inputs it differentiates; with 3 it leaves the extra tokens out."""

    def step(checking: bool) -> tuple[Tensor, ...]:
        if not inputs.case.trains:
            with torch.no_grad():
                return (attention(*inputs.leaves),)
        out = attention(*inputs.leaves)
        return (out.detach(), *torch.autograd.grad(out, inputs.leaves[:leaves], inputs.grad_out))

    return step


def fastib_attention(backend: str | None) -> Attention:
    """The operator under test, on its own choice of backend unless one is named."""
    from fastib.ops import head_token_attention

    return lambda *x: head_token_attention(*x, backend=backend)


def sdpa_joined(q, k, v, q_extra, k_extra, v_extra):
    """scaled_dot_product_attention over all tokens, the extra rows averaged into row 0."""
    joined = [torch.cat(pair, dim=2) for pair in ((q, q_extra), (k, k_extra), (v, v_extra))]
    out, rest = F.scaled_dot_product_attention(*joined).split((q.shape[2], q_extra.shape[2]), dim=2)
    return torch.cat((out[:, :, :1] + rest.mean(2, keepdim=True), out[:, :, 1:]), dim=2)


def sdpa_plain(q, k, v, q_extra, k_extra, v_extra):
    """Without the extra tokens: the floor, not the same function."""
    return F.scaled_dot_product_attention(q, k, v)


def compiled(attention: Attention) -> Attention:
    """torch.compile for fixed shapes, as one graph."""
    return torch.compile(attention, dynamic=False, fullgraph=True)


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""

    def of(make: Callable[[], Attention], leaves: int = 6) -> Callable[[], Step]:
        return lambda: make_step(inputs, make(), leaves)

    floor = "leaves the extra tokens out"
    return [
        Peer("fastib", of(lambda: fastib_attention(backend))),
        Peer("eager", of(lambda: head_token_attention_ref)),
        Peer("eager compiled", of(lambda: compiled(head_token_attention_ref)), slow_to_build=True),
        Peer("sdpa joined", of(lambda: sdpa_joined)),
        Peer("sdpa joined compiled", of(lambda: compiled(sdpa_joined)), slow_to_build=True),
        Peer("sdpa no extra", of(lambda: sdpa_plain, 3), gated=False, note=floor),
    ]
