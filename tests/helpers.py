"""What tests of operators share: where kernels run, inputs in awkward layouts, and errors measured against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastib import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend and, on the CPU, the instruction set it is forced to."""

    backend: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend

    def why_not(self) -> str | None:
        """Why tests cannot run there; None where they can."""
        if self.device == "cuda":
            return None if torch.cuda.is_available() else "no CUDA device"
        if not _native.lib_available():
            return _native.why_not()
        if self.isa not in _kernels().cpu_isas():
            return f"this CPU does not run {self.isa}"
        return None

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Runs the CPU kernels with this instruction set."""
        if self.isa is None:
            yield
            return
        before = _kernels().cpu_isa()
        _kernels().set_cpu_isa(self.isa)
        try:
            yield
        finally:
            _kernels().set_cpu_isa(before)


def _kernels():
    return importlib.import_module("fastib._kernels")


def kernel_targets(gpu: str | None = None) -> list[Target]:
    """Every place where kernels could run: the compiled instruction sets, and the GPU with the backend named."""
    isas = _native.build_info().get("cpu_isas_compiled", ["native"]) if _native.lib_available() else ["native"]
    return [*(Target("cpu", "cpu", isa) for isa in isas), *([Target(gpu, "cuda")] if gpu else [])]


def squarest_grid(patches: int) -> tuple[int, int]:
    """The factors of `patches` that are nearest to each other, fewer rows than columns; (0, 0) of none."""
    rows = math.isqrt(patches)
    while rows > 1 and patches % rows:
        rows -= 1
    return rows, patches // rows if rows else 0


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The same values as views of one (B, N, 3, H, D) tensor, as a packed projection gives them."""
    qkv = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).contiguous()
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def sliced(t: Tensor) -> Tensor:
    """The same values inside a larger tensor full of NaN, at an odd offset; dense rows."""
    big = t.new_full([s + 3 for s in t.shape], math.nan)
    view = big[tuple(slice(1, 1 + s) for s in t.shape)]
    return view.copy_(t)


def transposed_rows(t: Tensor) -> Tensor:
    """The same values with a last dimension that is not dense."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(t: Tensor) -> Tensor:
    """The first image of the batch, for all of it, with a batch stride of 0."""
    return t[:1].expand(t.shape)


def on_device(t: Tensor, device: str) -> Tensor:
    """`t` on `device`, with its strides and its offset in a copy of all its storage: `to` makes most views dense."""
    if t.device.type == device:
        return t
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64; NaN and infinity count as infinite unless both agree."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    if not actual.numel():
        return 0.0
    difference = (actual - exact).abs().masked_fill((actual.isnan() & exact.isnan()) | (actual == exact), 0.0)
    return difference.nan_to_num(nan=math.inf).max().item()


def data_floor(exact: Tensor, dtype: torch.dtype) -> float:
    """What rounding the exact result to `dtype` may cost: half a unit in the last place of its largest element."""
    finite = exact.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
    return finite.max().item() * torch.finfo(dtype).eps / 2 if exact.numel() else 0.0


def assert_twofold(
    actual: Tensor, same_precision: Tensor, exact: Tensor, dtype: torch.dtype, floor: float = 0.0, name: str = ""
) -> None:
    """The two-fold rule: at most twice the error of the same-precision reference, plus a floor taken from the data."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error, reference = max_error(actual, exact), max_error(same_precision, exact)
    limit = 2 * reference + max(floor, data_floor(exact, dtype))
    assert error <= limit, f"{name}: error {error:.3e} > {limit:.3e} (reference's {reference:.3e}) in {dtype}"


def value_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The result of `function(*inputs)`, and its gradients to all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def up_or_down(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every element a unit in the last place of `dtype` up or down."""
    signs = torch.randint(0, 2, t.shape, generator=generator, dtype=t.dtype) * 2 - 1
    return t * (1 + torch.finfo(dtype).eps * signs)


def conditioning(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor, dtype: torch.dtype
) -> list[float]:
    """What `up_or_down` on all inputs does to value and gradients, in float64: the most of 24 draws.

    function(*inputs, round=f) applies f to what it rounds on the way, too.
    """
    exact, floors = value_and_grads(function, inputs, grad_out), []
    generator = torch.Generator().manual_seed(0)

    def noisy(t: Tensor) -> Tensor:
        return up_or_down(t, dtype, generator)

    for _ in range(24):
        moved = value_and_grads(lambda *x: function(*x, round=noisy), list(map(noisy, inputs)), noisy(grad_out))
        floors.append([max_error(a, b) for a, b in zip(moved, exact, strict=True)])
    return [max(draws) for draws in zip(*floors, strict=True)]


def check_operator(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    steps: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_out: Tensor,
    dtype: torch.dtype,
    names: Sequence[str],
) -> None:
    """Value and gradients of a kernel by the two-fold rule. steps: the reference, as `conditioning` wants it."""
    wide = [t.detach().double().cpu() for t in inputs]
    exact = value_and_grads(reference, wide, grad_out.double().cpu())
    same = value_and_grads(reference, [t.cpu() for t in inputs], grad_out.cpu())
    if dtype == torch.float64:  # the exact answer errs too: what float32 loses here, at the scale of float64
        single, single_grad = [t.float().cpu() for t in inputs], grad_out.float().cpu()
        low = value_and_grads(reference, single, single_grad)
        low_exact = value_and_grads(reference, [t.double() for t in single], single_grad.double())
        shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        same = tuple(e + 1.5 * (s - x) * shrink for s, x, e in zip(low, low_exact, exact, strict=True))
    floors = conditioning(steps, wide, grad_out.double().cpu(), dtype)
    actual = value_and_grads(kernel, inputs, grad_out)
    for name, floor, *values in zip(("value", *names), floors, actual, same, exact, strict=True):
        if dtype == torch.float64:
            floor = 2 * max(floor, data_floor(values[2], dtype))  # ours and that of the exact answer
        assert_twofold(*values, dtype, floor, name)


def counted_linear(monkeypatch, user: str) -> list[tuple[int, ...]]:
    """The shapes that the module `user` gives to `linear`, whose own products take any size from now on."""
    shapes, own = [], sys.modules["fastib.ops.linear"]
    monkeypatch.setattr(own, "_FEW", 0)
    monkeypatch.setattr(own, "_SHARE", 0)
    monkeypatch.setattr(
        sys.modules[user], "linear", lambda x, *rest: shapes.append(tuple(x.shape)) or own.linear(x, *rest)
    )
    return shapes
