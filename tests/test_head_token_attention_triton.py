"""The Triton kernels of head_token_attention without a GPU: by value in Triton's interpreter, and as machine code.

Run as a script, under TRITON_INTERPRET=1, it computes the cases and prints one JSON line for each.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from helpers import data_floor, expanded, max_error, on_device, packed, sliced, transposed_rows

from fastib.reference.head_token_attention import head_token_attention_ref

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import (  # noqa: E402
    SHARED_LIMIT,
    compile_launch,
    complete_interpreter,
    interpreted_reports,
    launches_of,
)

from fastib.kernels.triton import head_token_attention  # noqa: E402

SEED = 0x1234_5678_9ABC_DEF0
INPUTS = ("q", "k", "v", "q_extra", "k_extra", "v_extra")
OUTPUTS = ("out", *(f"grad_{name}" for name in INPUTS))
KERNELS = (
    (head_token_attention, "head_token_attention_fwd_kernel"),
    (head_token_attention, "head_token_attention_delta_kernel"),
    (head_token_attention, "head_token_attention_bwd_kernel"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    tokens: int
    extra: int
    dim: int
    dtype: torch.dtype = torch.float32
    attn: float = 0.0
    layout: str = "dense"
    scale: float | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens}+{self.extra}-H{self.heads}-D{self.dim}-{dtype}-attn{self.attn}-{self.layout}"


CASES = [
    Case(1, 1, 1, 0, 16),
    Case(2, 1, 1, 1, 8),
    Case(2, 2, 17, 0, 24, attn=0.3, layout="sliced"),
    Case(1, 2, 31, 1, 16, layout="columns"),
    Case(2, 2, 15, 3, 8, attn=0.4, layout="expanded", scale=0.7),
    Case(1, 2, 5, 13, 33, layout="sliced"),  # full tiles of keys reach the extra tokens
    Case(1, 1, 40, 31, 16, attn=0.2, layout="packed"),
    Case(1, 1, 2, 63, 16, torch.bfloat16),  # all the extra tokens that fit in the first block of queries
    Case(1, 2, 9, 2, 16, attn=1.0),
    Case(2, 4, 65, 4, 48, layout="packed"),
    Case(1, 2, 65, 4, 48, torch.bfloat16, layout="packed"),
    Case(1, 1, 65, 4, 48, torch.float16, attn=0.1, layout="expanded"),
    Case(1, 1, 197, 6, 64, torch.bfloat16),
    Case(1, 1, 257, 8, 48, torch.bfloat16),
    Case(1, 1, 257, 8, 16, attn=0.1),
]


def inputs_of(case: Case, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """grad_out, q, k, v and the extra three in the case's dtype and layout."""
    torch.manual_seed(seed)
    shape = (case.batch, case.heads, case.tokens, case.dim)
    extra_shape = (case.batch, case.heads, case.extra, case.dim)
    grad_out, *tokens = (torch.randn(shape).to(case.dtype) for _ in range(4))
    extra = [torch.randn(extra_shape).to(case.dtype) for _ in range(3)]
    if case.layout == "packed":
        tokens, extra = packed(*tokens), packed(*extra)
    elif case.layout == "expanded":
        tokens[0], extra[1], grad_out = expanded(tokens[0]), expanded(extra[1]), grad_out[:, :1, :1].expand(shape)
    elif case.layout == "columns":
        grad_out, *tokens = (transposed_rows(t) for t in (grad_out, *tokens))
        extra = [transposed_rows(t) for t in extra]
    elif case.layout == "sliced":
        grad_out, *tokens = (sliced(t) for t in (grad_out, *tokens))
        extra = [sliced(t) for t in extra]
    return grad_out, *tokens, *extra


def run_reference(case: Case, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """out and the six gradients of the reference, in the precision of `tensors`."""
    grad_out, *inputs = tensors
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = head_token_attention_ref(*inputs, scale=case.scale, attn_dropout=case.attn, seed=SEED)
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)


def run_kernels(case: Case, tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    """out, stats and the six gradients of the Triton kernels."""
    grad_out, *inputs = (on_device(t, device) for t in tensors)
    options = torch.tensor([SEED], device=device), case.dim**-0.5 if case.scale is None else case.scale, case.attn
    out, stats = head_token_attention.head_token_attention_fwd(*inputs, *options)
    grads = head_token_attention.head_token_attention_bwd(grad_out, *inputs, out, stats, *options)
    return out, stats, *grads


def exact_lse(case: Case, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """log sum_j exp(s_ij) in float64, of the extra tokens first."""
    _, q, k, _, q_extra, k_extra, _ = (t.double() for t in tensors)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    scores = scale * torch.cat((q_extra, q), 2) @ torch.cat((k, k_extra), 2).transpose(-1, -2)
    return scores.logsumexp(-1)


def reference_errors(case: Case) -> dict[str, float]:
    """Largest errors of the reference in the case's precision over four draws."""
    errors = dict.fromkeys(OUTPUTS, 0.0)
    for seed in range(4):
        tensors = inputs_of(case, seed)
        exact = run_reference(case, tuple(t.double() for t in tensors))
        for name, low, ref in zip(OUTPUTS, run_reference(case, tensors), exact, strict=True):
            errors[name] = max(errors[name], max_error(low, ref))
    return errors


def compare(case: Case, device: str) -> dict:
    """Errors against float64 with their limits, by name. All memory that torch allocates is full of NaN at first."""
    tensors = inputs_of(case)
    torch.use_deterministic_algorithms(True)
    results = run_kernels(case, tensors, device)
    again = run_kernels(case, tensors, device) if case.tokens <= 32 or device != "cpu" else results
    torch.use_deterministic_algorithms(False)
    out, stats, *grads = results
    exact = dict(zip(OUTPUTS, run_reference(case, tuple(t.double() for t in tensors)), strict=True))
    low = reference_errors(case) if case.dtype != torch.float32 else None
    errors = {}
    for name, got in zip(OUTPUTS, (out, *grads), strict=True):
        assert got.shape == exact[name].shape, f"{name}: {got.shape}, expected {exact[name].shape}"
        limit = 1e-5 * max(0.1, exact[name].abs().max().item()) if got.numel() else 0.0
        if low is not None:
            limit = 2 * low[name] + data_floor(exact[name], case.dtype)
        errors[name] = max_error(got, exact[name]), limit
    lse = exact_lse(case, tensors)
    top, norm = stats.unbind(2)
    errors["stats"] = max_error(top * math.log(2) + norm.log(), lse), 1e-5 * max(1.0, lse.abs().max().item())
    return {
        "errors": errors,
        "same_bits": all(torch.equal(a, b) for a, b in zip(results, again, strict=True)),
        "layout": all(t.transpose(1, 2).is_contiguous() for t in (out, *grads)),
    }


def check(report: dict) -> None:
    for name, (error, limit) in report["errors"].items():
        assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e}"
    assert report["same_bits"], "two runs differ"
    assert report["layout"], "a result is not laid out as (B, N, H, D)"


def interpret_all() -> None:
    complete_interpreter()
    torch.set_num_threads(1)
    for case in CASES:
        print(json.dumps({"name": str(case), **compare(case, "cpu")}), flush=True)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    """Reports of all cases, computed by one process in Triton's interpreter."""
    return interpreted_reports(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter(interpreted, case):
    check(interpreted[str(case)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case):
    check(compare(case, "cuda"))


COMPILED = [
    (90, Case(1, 2, 65, 4, 48, torch.bfloat16, layout="packed")),
    (90, Case(1, 2, 257, 8, 48, torch.bfloat16, layout="packed")),
    (90, Case(1, 2, 65, 4, 64, torch.bfloat16, attn=0.1, layout="packed")),
    (90, Case(1, 1, 33, 40, 16, torch.bfloat16)),
    (90, Case(1, 1, 65, 0, 32, torch.bfloat16)),
    (90, Case(1, 2, 65, 4, 48, torch.float32)),
    (80, Case(1, 2, 65, 4, 48, torch.bfloat16, layout="packed")),
    (100, Case(1, 2, 257, 8, 48, torch.bfloat16, layout="packed")),
    (120, Case(1, 2, 65, 4, 48, torch.float16, layout="packed")),
]


@pytest.mark.parametrize(("capability", "case"), COMPILED, ids=lambda value: str(value))
def test_machine_code(monkeypatch, tmp_path, capability, case):
    """No spills, shared memory that the chip has, and in 16 bits Hopper's matrix instructions, where there are the 64
    rows that they take."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(head_token_attention.config, "chip_of", lambda q: capability // 10)
    launches = launches_of(monkeypatch, KERNELS, lambda: run_kernels(case, inputs_of(case), "cpu"))
    assert len(launches) == (3 if case.extra else 2)
    for kernel, args, options in launches:
        usage, code = compile_launch(kernel, args, options, capability)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel.__name__} spills: {usage}"
        assert "LDL" not in code and "STL" not in code
        assert usage["SHARED"] <= SHARED_LIMIT[capability], f"{kernel.__name__}: {usage}"
        if capability == 90 and case.dtype != torch.float32:
            few_rows = "delta" in kernel.__name__ and case.extra < 32
            assert ("HMMA" if few_rows else "HGMMA") in code, kernel.__name__


@pytest.mark.parametrize("shape", [(0, 2, 5, 3, 16), (2, 0, 5, 3, 16), (2, 2, 0, 3, 16), (2, 2, 5, 3, 0)])
def test_empty(monkeypatch, shape):
    B, H, N, T, D = shape
    q, x = torch.zeros(B, H, N, D), torch.zeros(B, H, T, D)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, None)
    out, stats = head_token_attention.head_token_attention_fwd(q, q, q, x, x, x, None, 1.0, 0.0)
    grads = head_token_attention.head_token_attention_bwd(out, q, q, q, x, x, x, out, stats, None, 1.0, 0.0)
    assert out.shape == q.shape and stats.shape == (B, H, 2, N + T)
    assert [g.shape for g in grads] == [q.shape] * 3 + [x.shape] * 3
    assert not any(t.any() for t in (stats, *grads))


@pytest.mark.parametrize(
    ("tokens", "extra", "dim", "dtype", "message"),
    [
        (4, 1, 16, torch.float64, "float64"),
        (4, 1, 257, torch.float32, "D <= 256"),
        (4, 32, 16, torch.float32, "less than 32 extra tokens in torch.float32 with D=16, got T=32"),
        (4, 64, 64, torch.bfloat16, "less than 64 extra tokens .*backend='reference'"),
    ],
)
def test_refused(tokens, extra, dim, dtype, message):
    q, x = torch.zeros((1, 1, tokens, dim), dtype=dtype), torch.zeros((1, 1, extra, dim), dtype=dtype)
    with pytest.raises(RuntimeError, match=f"head_token_attention.*{message}"):
        head_token_attention.head_token_attention_fwd(q, q, q, x, x, x, None, 1.0, 0.0)


if __name__ == "__main__":
    interpret_all()
