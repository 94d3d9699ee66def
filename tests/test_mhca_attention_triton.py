"""The Triton kernels of mhca_attention without a GPU: by value in Triton's interpreter, and as machine code.

Run as a script, under TRITON_INTERPRET=1, it computes the cases and prints one JSON line for each.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from helpers import data_floor, expanded, max_error, on_device, packed, sliced, transposed_rows

from fastib.reference.mhca_attention import RPE_STREAM, keep_factor, keep_mask, mhca_attention_ref, position_term

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton_tools import (  # noqa: E402
    SHARED_LIMIT,
    compile_launch,
    complete_interpreter,
    interpreted_reports,
    launches_of,
)

from fastib.kernels.triton import mhca_attention, relative_position  # noqa: E402
from fastib.kernels.triton.philox import keep_bits, threshold_and_factor  # noqa: E402

SEED = 0x1234_5678_9ABC_DEF0
MASK32 = 0xFFFFFFFF
OUTPUTS = ("out", "grad_q", "grad_k", "grad_v", "grad_alpha", "grad_center")
KERNELS = (
    (mhca_attention, "mhca_attention_fwd_kernel"),
    (mhca_attention, "mhca_attention_bwd_kernel"),
    (mhca_attention, "_bwd_reduce_kernel"),
    (relative_position, "_rpe_mask_kernel"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    grid: tuple[int, int]
    prefix: int
    dim: int
    dtype: torch.dtype = torch.float32
    rpe: float = 0.0
    attn: float = 0.0
    layout: str = "dense"
    scale: float | None = None

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        grid = "x".join(map(str, self.grid))
        return f"{grid}+{self.prefix}-D{self.dim}-{dtype}-rpe{self.rpe}-attn{self.attn}-{self.layout}"


CASES = [
    Case(2, 1, (1, 1), 0, 16),
    Case(1, 2, (1, 1), 1, 8),
    Case(1, 1, (0, 0), 2, 16),
    Case(2, 2, (4, 4), 1, 16, layout="packed"),
    Case(2, 2, (3, 5), 2, 8, rpe=0.3, attn=0.4, layout="expanded"),
    Case(1, 2, (7, 2), 0, 24, attn=0.2, layout="columns", scale=0.7),
    Case(2, 1, (2, 9), 1, 33, rpe=0.5, layout="sliced"),
    Case(2, 2, (3, 5), 1, 16, rpe=1.0),
    Case(2, 2, (3, 5), 1, 16, attn=1.0),
    Case(1, 1, (8, 8), 1, 64, layout="packed"),
    Case(1, 1, (5, 13), 0, 32, torch.float16, rpe=0.1, attn=0.1),
    Case(1, 2, (8, 8), 1, 48, torch.bfloat16, rpe=0.1, layout="packed"),
    Case(1, 1, (8, 8), 1, 32, torch.bfloat16),
    Case(1, 1, (4, 4), 1, 16, torch.bfloat16, layout="opposed"),
    Case(1, 1, (14, 14), 1, 64, torch.bfloat16, rpe=0.1, layout="expanded"),
    Case(1, 1, (14, 14), 1, 16, rpe=0.1, attn=0.1),
]


def inputs_of(case: Case, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """grad_out, q, k, v, alpha, center in the case's dtype and layout."""
    torch.manual_seed(seed)
    shape = (case.batch, case.heads, case.tokens, case.dim)
    grad_out, q, k, v = (torch.randn(shape).to(case.dtype) for _ in range(4))
    if case.layout == "packed":
        q, k, v = packed(q, k, v)
    elif case.layout == "expanded":
        q, grad_out = expanded(q), torch.ones((), dtype=case.dtype).expand(shape)
    elif case.layout == "columns":
        grad_out, q, k, v = (transposed_rows(t) for t in (grad_out, q, k, v))
    elif case.layout == "sliced":
        grad_out, q, k, v = (sliced(t) for t in (grad_out, q, k, v))
    elif case.layout == "opposed":  # every score far below 0, where the keys of a tile beyond the last have theirs
        q, k = q + 8, k - 8
    return grad_out, q, k, v, 0.1 + 0.4 * torch.rand(case.heads), torch.randn(case.heads, 2)


def run_reference(case: Case, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """out and the five gradients of the reference, in the precision of `tensors`."""
    grad_out, *inputs = tensors
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = mhca_attention_ref(*inputs, case.grid, num_prefix_tokens=case.prefix, scale=case.scale, rpe_dropout=case.rpe,
                             attn_dropout=case.attn, seed=SEED)  # fmt: skip
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)


def run_kernels(case: Case, tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    """out, stats and the five gradients of the Triton kernels."""
    grad_out, *inputs = (on_device(t, device) for t in tensors)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    options = (torch.tensor([SEED], device=device), *case.grid, case.prefix, scale, case.rpe, case.attn)
    out, stats = mhca_attention.mhca_attention_fwd(*inputs, *options)
    return out, stats, *mhca_attention.mhca_attention_bwd(grad_out, *inputs, out, stats, *options)


def exact_lse(case: Case, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """log sum_j exp(s_ij) in float64."""
    _, q, k, _, alpha, center = (t.double() for t in tensors)
    bias = position_term(alpha, center, case.grid, case.prefix)
    if case.rpe:
        bias = bias * keep_mask(SEED, tuple(bias.shape), case.rpe, RPE_STREAM) * keep_factor(case.rpe)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    return (scale * q @ k.transpose(-1, -2) + bias).logsumexp(-1)


def reference_errors(case: Case) -> dict[str, float]:
    """Largest errors of the reference in the case's precision over eight draws: a head has one gradient of alpha."""
    errors = dict.fromkeys(OUTPUTS, 0.0)
    for seed in range(8):
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
    again = run_kernels(case, tensors, device) if case.tokens <= 64 or device != "cpu" else results
    torch.use_deterministic_algorithms(False)
    exact = dict(zip(OUTPUTS, run_reference(case, tuple(t.double() for t in tensors)), strict=True))
    low = reference_errors(case) if case.dtype != torch.float32 else None
    errors = {}
    for name, got in zip(OUTPUTS, (results[0], *results[2:]), strict=True):
        assert got.shape == exact[name].shape, f"{name}: {got.shape}, expected {exact[name].shape}"
        limit = 1e-5 * max(1.0, exact[name].abs().max().item())
        if low is not None:
            limit = 2 * low[name] + data_floor(exact[name], case.dtype)
        errors[name] = max_error(got, exact[name]), limit
    lse = exact_lse(case, tensors)
    top, norm = results[1].unbind(2)
    errors["stats"] = max_error(top * math.log(2) + norm.log(), lse), 1e-5 * max(1.0, lse.abs().max().item())
    return {
        "errors": errors,
        "same_bits": all(torch.equal(a, b) for a, b in zip(results, again, strict=True)),
        "layout": all(t.transpose(1, 2).is_contiguous() for t in (results[0], *results[2:5])),
    }


# tensor of inputs_of and its first elements
HOSTILE = {
    "NaN in a prefix query": (1, [math.nan]),
    "NaN alpha": (4, [math.nan]),
    "infinite alpha": (4, [math.inf]),
    "largest alpha": (4, [3.4e38, 3.4e38]),
    "NaN center": (5, [math.nan]),
    "infinite center": (5, [0.0, -math.inf]),
}


def compare_hostile(name: str, prefix: int, device: str) -> dict:
    """Errors against float64 with their limits; NaN agrees with NaN alone. The keys take several tiles."""
    case = Case(2, 2, (1, 70), prefix, 8)
    tensors = inputs_of(case)
    which, values = HOSTILE[name]
    tensors[which].view(-1)[: len(values)] = torch.tensor(values)
    if name == "largest alpha":  # each patch attends to itself
        tensors[5].zero_()
    out, _, *grads = run_kernels(case, tensors, device)
    errors = {}
    for result, got, exact in zip(
        OUTPUTS, (out, *grads), run_reference(case, [t.double() for t in tensors]), strict=True
    ):
        limit = 1e-5 * max(1.0, exact.nan_to_num(0.0).abs().max().item())
        errors[result] = max_error(got, exact), limit
    return {"errors": errors}


def check(report: dict) -> None:
    for name, (error, limit) in report["errors"].items():
        assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e}"
    assert report.get("same_bits", True), "two runs differ"
    assert report.get("layout", True), "a result is not laid out as (B, N, H, D)"


@triton.jit
def keep_bits_kernel(out_ptr, seed_ptr, first_ptr, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    bits = keep_bits(tl.load(seed_ptr), 1, tl.load(first_ptr + rows), threshold, COLS)
    tl.store(out_ptr + rows, bits)


def python_word(seed: int, stream: int, element: int) -> int:
    """The random word of an element, in Python's integers."""
    counter, key = [element >> 2 & MASK32, element >> 34, stream, 0], [seed & MASK32, seed >> 32]
    for _ in range(10):
        high, low = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [low >> 32 ^ counter[1] ^ key[0], low & MASK32, high >> 32 ^ counter[3] ^ key[1], high & MASK32]
        key = [key[0] + 0x9E3779B9 & MASK32, key[1] + 0xBB67AE85 & MASK32]
    return counter[element & 3]


def compare_bits(cols: int, p: float, device: str) -> dict:
    """Mask bits of rows that begin at any phase of a counter, below and above 2^34 elements."""
    starts = [0, 1, 2, 3, 197, 4 * 2**32 - 5, 2**36 + 2, 2**45 + 3]
    seed = torch.tensor([-(2**63) + SEED], device=device)
    out = torch.empty(len(starts), dtype=torch.int64, device=device)
    signed, _ = threshold_and_factor(p)
    threshold = min(int(p * 2**32), MASK32)
    keep_bits_kernel[(1,)](out, seed, torch.tensor(starts, device=device), signed, len(starts), cols)
    got = [[bits >> c & 1 for c in range(cols)] for bits in out.tolist()]
    key = seed.item() & 2**64 - 1
    want = [[int(python_word(key, 1, start + c) >= threshold) for c in range(cols)] for start in starts]
    return {"equal": got == want, "kept": sum(map(sum, got)) / (cols * len(starts))}


HOSTILE_CASES = [(name, prefix) for name in HOSTILE for prefix in (0, 2)]
BITS = [(16, 0.25), (32, 0.5), (64, 0.1), (64, 1.0)]


def interpret_all() -> None:
    complete_interpreter()
    torch.set_num_threads(1)
    for cols, p in BITS:
        print(json.dumps({"name": f"bits-{cols}-{p}", **compare_bits(cols, p, "cpu")}), flush=True)
    for name, prefix in HOSTILE_CASES:
        print(json.dumps({"name": f"{name}-{prefix}", **compare_hostile(name, prefix, "cpu")}), flush=True)
    for case in CASES:
        print(json.dumps({"name": str(case), **compare(case, "cpu")}), flush=True)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    """Reports of all cases, computed by one process in Triton's interpreter."""
    return interpreted_reports(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter(interpreted, case):
    check(interpreted[str(case)])


@pytest.mark.parametrize(("name", "prefix"), HOSTILE_CASES)
def test_interpreter_hostile_parameters(interpreted, name, prefix):
    check(interpreted[f"{name}-{prefix}"])


@pytest.mark.parametrize(("cols", "p"), BITS)
def test_interpreter_masks(interpreted, cols, p):
    assert interpreted[f"bits-{cols}-{p}"]["equal"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case):
    check(compare(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "prefix"), HOSTILE_CASES)
def test_gpu_hostile_parameters(name, prefix):
    check(compare_hostile(name, prefix, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("cols", "p"), BITS)
def test_gpu_masks(cols, p):
    assert compare_bits(cols, p, "cuda")["equal"]


COMPILED = [
    (90, Case(1, 2, (14, 14), 1, 64, torch.bfloat16, layout="packed")),
    (90, Case(1, 2, (14, 14), 1, 64, torch.bfloat16, rpe=0.1, attn=0.1, layout="packed")),
    (90, Case(1, 2, (14, 14), 1, 48, torch.bfloat16, rpe=0.1, layout="packed")),
    (90, Case(1, 2, (8, 8), 1, 32, torch.bfloat16, layout="packed")),
    (90, Case(1, 2, (8, 8), 0, 16, torch.bfloat16, attn=0.1, layout="packed")),
    (90, Case(1, 2, (14, 14), 1, 64, torch.float32, rpe=0.1)),
    (80, Case(1, 2, (14, 14), 1, 64, torch.bfloat16, rpe=0.1, layout="packed")),
    (100, Case(1, 2, (14, 14), 1, 64, torch.bfloat16, rpe=0.1, layout="packed")),
    (120, Case(1, 2, (14, 14), 1, 64, torch.float16, rpe=0.1, layout="packed")),
]


@pytest.mark.parametrize(("capability", "case"), COMPILED, ids=lambda value: str(value))
def test_machine_code(monkeypatch, tmp_path, capability, case):
    """No spills, shared memory that the chip has, and Hopper's matrix instructions in 16 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(mhca_attention.config, "chip_of", lambda q: capability // 10)
    launches = launches_of(monkeypatch, KERNELS, lambda: run_kernels(case, inputs_of(case), "cpu"))
    assert len(launches) == 3 + 2 * (case.rpe > 0)
    for kernel, args, options in launches:
        usage, code = compile_launch(kernel, args, options, capability)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel.__name__} spills: {usage}"
        assert "LDL" not in code and "STL" not in code
        assert usage["SHARED"] <= SHARED_LIMIT[capability], f"{kernel.__name__}: {usage}"
        if capability == 90 and case.dtype != torch.float32 and kernel.__name__.startswith("mhca_attention"):
            assert "HGMMA" in code, f"{kernel.__name__} does not use wgmma"
            if case.dim <= 32 and not (case.rpe or case.attn):
                assert usage["REG"] * options["num_warps"] * 32 * 3 <= 65536, f"two programs on a processor: {usage}"


def test_shared_memory(monkeypatch, tmp_path):
    """Rows of 256 float32 launch where a program has 99 KB."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(mhca_attention.config, "chip_of", lambda q: 12)
    case = Case(1, 1, (7, 7), 1, 256)
    for kernel, args, options in launches_of(monkeypatch, KERNELS, lambda: run_kernels(case, inputs_of(case), "cpu")):
        usage, _ = compile_launch(kernel, args, options, 120)
        assert usage["SHARED"] <= SHARED_LIMIT[120], f"{kernel.__name__}: {usage}"


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16), (2, 2, 5, 0)])
def test_empty(monkeypatch, shape):
    _, H, N, _ = shape
    q = torch.zeros(shape)
    alpha, center = torch.ones(H), torch.ones(H, 2)
    grid = (2, 2, 1) if N else (0, 0, 0)
    monkeypatch.setattr(mhca_attention, "mhca_attention_fwd_kernel", None)
    monkeypatch.setattr(mhca_attention, "mhca_attention_bwd_kernel", None)
    out, stats = mhca_attention.mhca_attention_fwd(q, q, q, alpha, center, None, *grid, 1.0, 0.0, 0.0)
    grads = mhca_attention.mhca_attention_bwd(out, q, q, q, alpha, center, out, stats, None, *grid, 1.0, 0.0, 0.0)
    assert out.shape == shape and stats.shape == (*shape[:2], 2, shape[2])
    assert [g.shape for g in grads] == [q.shape, q.shape, q.shape, alpha.shape, center.shape]
    assert not grads[3].any() and not grads[4].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 1, 4, 16), torch.float64, "float64"), ((1, 1, 4, 257), torch.float32, "D <= 256")],
)
def test_refused(shape, dtype, message):
    q = torch.zeros(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        mhca_attention.mhca_attention_fwd(q, q, q, torch.ones(1), torch.ones(1, 2), None, 2, 2, 0, 1.0, 0.0, 0.0)


if __name__ == "__main__":
    interpret_all()
