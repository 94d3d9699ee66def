"""Peers of `mhca_attention`: eager, compiled, scaled_dot_product_attention in four guises, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Peer, Step, Unavailable
from fastib.reference.mhca_attention import RPE_STREAM, mhca_attention_ref, position_term
from fastib.reference.philox import keep_factor, keep_mask

RESULTS = ("out", "grad_q", "grad_k", "grad_v", "grad_alpha", "grad_center")


def allowed(dtype: str, trains: bool = True) -> dict[str, float]:
    """Relative error that the gate lets pass, per result. The last two are sums with cancellation."""
    element, total = (2e-2, 5e-2) if dtype in ("bfloat16", "float16") else (2e-5, 2e-4)
    return {name: total if name in RESULTS[4:] else element for name in (RESULTS if trains else RESULTS[:1])}


@dataclass(frozen=True)
class Case:
    """One row of the table: shapes, element type, what is timed, and where."""

    B: int
    H: int
    grid: int
    D: int
    dtype: str
    mode: str  # forward | train: and gradients to all five inputs | memory: train, at lengths where memory shows
    rpe_dropout: float = 0.0
    device: str = "cpu"
    layout: str = "dense"  # dense (B, H, N, D) | packed: views of one (B, N, 3, H, D)

    @property
    def N(self) -> int:
        return 1 + self.grid**2

    @property
    def trains(self) -> bool:
        return self.mode != "forward"

    @property
    def key(self) -> str:
        """Identifies the case in files, test names and `-k` expressions."""
        drop = f"-rpe{self.rpe_dropout:g}" if self.rpe_dropout else ""
        layout = "" if self.layout == "dense" else f"-{self.layout}"
        return f"{self.device}-{self.mode}-B{self.B}-H{self.H}-N{self.N}-D{self.D}-{self.dtype}{drop}{layout}"

    def flops(self) -> float:
        """Two products forward; five backward, of which one is recomputed. The same count for every peer."""
        return (14 if self.trains else 4) * self.B * self.H * self.N**2 * self.D

    def bytes(self) -> float:
        """Each input read once and each result written once: q, k, v, out; then q, k, v, out, and four gradients."""
        tensors = 12 if self.trains else 4
        return tensors * self.B * self.H * self.N * self.D * getattr(torch, self.dtype).itemsize


class Inputs:
    """Tensors of a case, drawn when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def _drawn(self) -> tuple[list[Tensor], Tensor]:
        case = self.case
        options = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(7)}
        dtype, shape = getattr(torch, case.dtype), (case.B, case.H, case.N, case.D)
        if case.layout == "packed":
            packed = torch.randn(case.B, case.N, 3, case.H, case.D, **options).to(dtype)
            qkv = packed.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            qkv = [torch.randn(shape, **options).to(dtype) for _ in range(3)]
        alpha = 0.2 + 0.8 * torch.rand(case.H, **options)
        center = torch.randn(case.H, 2, **options)
        leaves = [tensor.detach().requires_grad_(case.trains) for tensor in (*qkv, alpha, center)]
        return leaves, torch.randn(shape, **options).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        """q, k, v (B, H, N, D), alpha (H,), center (H, 2)."""
        return self._drawn[0]

    @property
    def grad_out(self) -> Tensor:
        """(B, H, N, D)."""
        return self._drawn[1]

    @cached_property
    def seed(self) -> Tensor:
        """Of the shared dropout mask."""
        return torch.full((1,), 20221110, dtype=torch.int64, device=self.case.device)

    def release(self) -> None:
        """Drops the tensors; they are drawn again, the same, if they are asked for."""
        for name in ("_drawn", "seed"):
            self.__dict__.pop(name, None)

    def shared_factor(self) -> Tensor | None:
        """keep / (1 - p) of the shared mask, (H, N, N); None without dropout."""
        case = self.case
        if not case.rpe_dropout:
            return None
        keep = keep_mask(self.seed, (case.H, case.N, case.N), case.rpe_dropout, RPE_STREAM, torch.device(case.device))
        return keep.float() * keep_factor(case.rpe_dropout)

    def new_factor(self) -> Tensor | None:
        """keep / (1 - p) of a new mask from torch's generator, as eager dropout draws it."""
        case = self.case
        if not case.rpe_dropout:
            return None
        keep = torch.empty(case.H, case.N, case.N, device=case.device).bernoulli_(1 - case.rpe_dropout)
        return keep.mul_(keep_factor(case.rpe_dropout))


def reference(inputs: Inputs, images: int = 8) -> tuple[Tensor, ...]:
    """out and, in training, the five gradients, in float64, a few images at a time to bound the memory."""
    case = inputs.case
    alpha, center = (leaf.detach().double().requires_grad_(True) for leaf in inputs.leaves[3:])
    parts = []
    for begin in range(0, case.B, images):
        part = slice(begin, begin + images)
        q, k, v = (leaf.detach()[part].double().requires_grad_(True) for leaf in inputs.leaves[:3])
        seed = inputs.seed if case.rpe_dropout else None
        out = mhca_attention_ref(
            q, k, v, alpha, center, (case.grid, case.grid), rpe_dropout=case.rpe_dropout, seed=seed
        )
        grads = ()
        if case.trains:
            grads = torch.autograd.grad(out, (q, k, v, alpha, center), inputs.grad_out[part].double())
        parts.append((out.detach(), *grads))
    columns = list(zip(*parts, strict=True))
    return tuple(torch.cat(column) if index < 4 else torch.stack(column).sum(0) for index, column in enumerate(columns))


Attention = Callable[..., Tensor]  # (q, k, v, alpha, center, factor) -> out


def make_step(inputs: Inputs, attention: Attention, leaves: int = 5, context=nullcontext) -> Step:
    """A step of a peer that takes dropout as a (H, N, N) factor.

    leaves: how many of the inputs it differentiates; with 3 it has no position term, and draws no factor.
    """
    shared = inputs.shared_factor() if leaves == 5 else None

    def step(checking: bool) -> tuple[Tensor, ...]:
        factor = shared if checking or leaves < 5 else inputs.new_factor()
        with context():
            if not inputs.case.trains:
                with torch.no_grad():
                    return (attention(*inputs.leaves, factor),)
            out = attention(*inputs.leaves, factor)
            return (out.detach(), *torch.autograd.grad(out, inputs.leaves[:leaves], inputs.grad_out))

    return step


def fastib_step(inputs: Inputs, backend: str | None = None) -> Step:
    """The operator under test, on its own choice of backend unless one is named."""
    from fastib.ops import mhca_attention

    case = inputs.case
    options = {"rpe_dropout": case.rpe_dropout, "backend": backend}

    def step(checking: bool) -> tuple[Tensor, ...]:
        seed = inputs.seed if checking and case.rpe_dropout else None
        if not case.trains:
            with torch.no_grad():
                return (mhca_attention(*inputs.leaves, (case.grid, case.grid), seed=seed, **options),)
        out = mhca_attention(*inputs.leaves, (case.grid, case.grid), seed=seed, **options)
        return (out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out))

    return step


def eager(grid: int, wide: bool = True) -> Attention:
    """The reference's formula with a given dropout factor; `wide` keeps the scores and the softmax in float32."""

    def attention(q, k, v, alpha, center, factor):
        bias = position_term(alpha, center, (grid, grid))
        bias = bias if factor is None else bias * factor
        bias = bias if wide else bias.to(q.dtype)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return scores.softmax(dim=-1).to(v.dtype) @ v

    return attention


def sdpa_mask(grid: int) -> Attention:
    """scaled_dot_product_attention with the position term as a floating-point mask, built anew in every step."""

    def attention(q, k, v, alpha, center, factor):
        bias = position_term(alpha, center, (grid, grid))
        bias = bias if factor is None else bias * factor
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])

    return attention


def sdpa_plain(q, k, v, alpha, center, factor):
    """No position term at all: the floor, not the same function."""
    return F.scaled_dot_product_attention(q, k, v)


def two_terms(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 tensor as a sum of two that `dtype` holds; the gradient takes the way through the second.

    The first is cut off bit by bit: a cast there and back is what a compiler is free to leave out.
    """
    dropped_bits = 23 - (7 if dtype == torch.bfloat16 else 10)
    high = (tensor.detach().view(torch.int32) & -(1 << dropped_bits)).view(torch.float32)
    return high, tensor - high


def sdpa_augmented(grid: int, device: str, split: bool = False) -> Attention:
    """Without dropout the position term has rank 4: it fits into four more channels of q and k.

    q' = [scale q, -a, 2a(p_i + c)_row, 2a(p_i + c)_column, const_i], k' = [k, |p_j|^2, p_j_row, p_j_column, 1], the new
    channels 0 on the class token, p counted from the middle of the grid. `split` writes each factor that the element
    type would round as two channels, a high and a low part.
    """
    token = torch.arange(grid * grid, device=device)
    middle = (grid - 1) / 2
    place = F.pad(torch.stack((token // grid - middle, token % grid - middle), -1), (0, 0, 1, 0))  # (N, 2)
    patch = F.pad(torch.ones(grid * grid, device=device), (1, 0))  # (N,)
    square = place.square().sum(-1)

    def attention(q, k, v, alpha, center, factor):
        dtype, width = q.dtype, q.shape[-1]
        a = alpha[:, None]
        along = 2 * a[..., None] * (place + center[:, None]) * patch[:, None]  # (H, N, 2)
        const = -a * (square + 2 * (center[:, None] * place).sum(-1)) * patch
        # (H, N) times (N,): their products sum to the position term. Only `square` and the left ones ever round.
        pairs = [(-a * patch, square), (along[..., 0], place[:, 0]), (along[..., 1], place[:, 1]), (const, patch)]
        if split:
            pairs = [
                (x, y)
                for left, right in pairs
                for x in two_terms(left, dtype)
                for y in (two_terms(right, dtype) if right is square else (right,))
            ]
        spare = -(width + len(pairs)) % 8 if q.is_cuda else 0
        extra_q = F.pad(torch.stack([pair[0] for pair in pairs], -1), (0, spare)).to(dtype)
        extra_k = F.pad(torch.stack([pair[1] for pair in pairs], -1), (0, spare)).to(dtype)
        wide_q = torch.cat((q * width**-0.5, extra_q.expand(*q.shape[:-1], -1)), -1)
        wide_k = torch.cat((k, extra_k.expand(*k.shape[:-1], -1)), -1)
        wide_v = F.pad(v, (0, wide_q.shape[-1] - width))
        return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., :width]

    return attention


def flex(grid: int, device: str) -> Attention:
    """FlexAttention with the position term in its score function, alpha and center captured."""
    from torch.nn.attention.flex_attention import flex_attention

    token = torch.arange(grid * grid, device=device)
    row, column = (F.pad(place.float(), (1, 0)) for place in (token // grid, token % grid))
    patch = F.pad(torch.ones(grid * grid, device=device), (1, 0))

    def attention(q, k, v, alpha, center, factor):
        def add_position(score, b, h, i, j):
            d_row, d_column = row[j] - row[i], column[j] - column[i]
            toward = center[h, 0] * d_row + center[h, 1] * d_column
            bias = -alpha[h] * (d_row * d_row + d_column * d_column - 2 * toward) * patch[i] * patch[j]
            return score + (bias if factor is None else bias * factor[h, i, j])

        return flex_attention(q, k, v, score_mod=add_position)

    return attention


def pinned(*backends: SDPBackend):
    """A context that allows only these SDPA backends."""
    return lambda: sdpa_kernel(list(backends))


def compiled(attention: Attention) -> Attention:
    """torch.compile for fixed shapes, as one graph."""
    return torch.compile(attention, dynamic=False, fullgraph=True)


def peers(inputs: Inputs, backend: str | None = None) -> list[Peer]:
    """Every peer of a case, ours first."""
    case, grid = inputs.case, inputs.case.grid
    gpu, low = case.device == "cuda", case.dtype in ("bfloat16", "float16")

    def of(make: Callable[[], Attention], context=nullcontext, leaves: int = 5) -> Callable[[], Step]:
        return lambda: make_step(inputs, make(), leaves, context)

    def no_dropout(make: Callable[[], Attention]) -> Callable[[], Attention]:
        def build():
            if case.rpe_dropout:
                raise Unavailable("with rpe_dropout the position term has no low rank")
            return make()

        return build

    def make_flex():
        if not gpu and case.trains:
            raise Unavailable("FlexAttention has no backward on the CPU")
        return compiled(flex(grid, case.device))

    def augmented(split: bool = False):
        return lambda: sdpa_augmented(grid, case.device, split)

    def slow(name: str, build: Callable[[], Step], note: str = "") -> Peer:
        return Peer(name, build, note=note, slow_to_build=True)

    floor, split = "computes no position term", "position factors in two terms each"
    result = [
        Peer("fastib", lambda: fastib_step(inputs, backend)),
        Peer("eager", of(lambda: eager(grid))),
        slow("eager compiled", of(lambda: compiled(eager(grid)))),
        Peer("sdpa mask", of(lambda: sdpa_mask(grid))),
        slow("sdpa mask compiled", of(lambda: compiled(sdpa_mask(grid)))),
        Peer("sdpa augmented", of(no_dropout(augmented()))),
    ]
    if low:
        # Four bare channels are wrong in 16 bits, so only the form with split factors is worth compiling.
        result += [
            Peer("eager low", of(lambda: eager(grid, wide=False)), note="scores and softmax in the element type"),
            Peer("sdpa augmented split", of(no_dropout(augmented(True))), note=split),
            slow("sdpa augmented split compiled", of(no_dropout(lambda: compiled(augmented(True)()))), split),
        ]
    else:
        result.append(slow("sdpa augmented compiled", of(no_dropout(lambda: compiled(augmented()())))))
    if gpu:
        cudnn, math_, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
        result += [
            Peer("sdpa mask math", of(lambda: sdpa_mask(grid), pinned(math_))),
            Peer("sdpa mask cudnn", of(lambda: sdpa_mask(grid), pinned(cudnn))),
            Peer("sdpa no bias cudnn", of(lambda: sdpa_plain, pinned(cudnn), 3), gated=False, note=floor),
            Peer("sdpa no bias flash", of(lambda: sdpa_plain, pinned(flash), 3), gated=False, note=floor),
        ]
    else:
        result.append(Peer("sdpa no bias", of(lambda: sdpa_plain, leaves=3), gated=False, note=floor))
    result.append(Peer("flex", of(make_flex)))
    return result
