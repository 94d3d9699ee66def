"""The Triton kernels of feature_alignment_loss without a GPU: by value, and as machine code.

Run as a script, under TRITON_INTERPRET=1, it computes the cases and prints one JSON line for each.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers import data_floor, max_error, on_device, value_and_grads

from fastib.reference import feature_alignment_loss_ref

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import (  # noqa: E402
    SHARED_LIMIT,
    compile_launch,
    complete_interpreter,
    interpreted_reports,
    launches_of,
)

from fastib.kernels.triton import feature_alignment  # noqa: E402

KERNELS = [(feature_alignment, f"feature_alignment_{way}_kernel") for way in ("fwd", "bwd")]
# B, N, M, C, dtype, center
CASES = {
    "early layer": (1, 49, 196, 288, torch.float32, True),
    "late layer": (1, 196, 49, 288, torch.bfloat16, True),
    "equal lengths": (2, 17, 17, 72, torch.float16, True),
    "not centred": (2, 6, 3, 40, torch.float32, False),
    "one of each": (1, 1, 1, 1, torch.float32, True),
    "wide": (2, 3, 6, 3000, torch.float32, True),
    "widest": (1, 2, 4, 16384, torch.float32, True),
}


def inputs(case):
    B, N, M, C, dtype, _ = CASES[case]
    torch.manual_seed(0)
    student, teacher = torch.randn(B, N + 1, C).to(dtype)[:, 1:], torch.randn(B, M, C).to(dtype)
    return student, teacher, torch.rand(B, min(N, M))


def run(case, student, teacher, grad):
    center = CASES[case][5]
    loss, direction, factor = feature_alignment.feature_alignment_fwd(student, teacher, center, 1e-5, True)
    plain, *empty = feature_alignment.feature_alignment_fwd(student, teacher, center, 1e-5, False)
    assert not any(t.numel() for t in empty)
    return loss, plain, feature_alignment.feature_alignment_bwd(grad, direction, factor, student.shape[1])


def run_reference(case, student, teacher, grad):
    options = {"center": CASES[case][5], "reduction": "none"}
    loss, gradient = value_and_grads(lambda s: feature_alignment_loss_ref(s, teacher, **options), [student], grad)
    return loss, loss, gradient


def compared(case, device) -> dict:
    """Largest error of each result and its limit: twice that of the same-precision reference, plus a floor."""
    tensors = inputs(case)
    results = run(case, *(on_device(t, device) for t in tensors))
    report = {}
    wide = [t.double() for t in tensors]
    for i, (got, low, exact) in enumerate(
        zip(results, run_reference(case, *tensors), run_reference(case, *wide), strict=True)
    ):
        assert got.shape == exact.shape
        rounding = 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        kept = 2 * data_floor(exact, tensors[0].dtype) if i == 2 else 0.0  # the direction is kept in this dtype
        report[i] = max_error(got, exact), 2 * max_error(low, exact) + kept + rounding
    return {"errors": report}


def check(report: dict) -> None:
    for name, (error, limit) in report["errors"].items():
        assert error <= limit, f"result {name}: error {error:.2e} above {limit:.2e}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    """Reports of all cases, computed by one process in Triton's interpreter."""
    return interpreted_reports(__file__)


@pytest.mark.parametrize("case", CASES)
def test_interpreter(interpreted, case):
    check(interpreted[case])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_gpu(case):
    check(compared(case, "cuda"))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("case", ["early layer", "late layer", "wide", "widest"])
def test_machine_code(monkeypatch, tmp_path, capability, case):
    """No spills, and shared memory that the chip has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of(monkeypatch, KERNELS, lambda: run(case, *inputs(case)))
    assert len(launches) == 3
    for kernel, args, options in launches:
        usage, _ = compile_launch(kernel, args, options, capability)
        assert usage["LOCAL"] == 0 and usage["STACK"] == 0, usage
        assert usage["SHARED"] <= SHARED_LIMIT[capability]


def test_refusals():
    with pytest.raises(RuntimeError, match=r"take float32, bfloat16 or float16, got torch\.float64"):
        feature_alignment.feature_alignment_fwd(
            torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3).double(), True, 0.0, True
        )
    with pytest.raises(RuntimeError, match="take up to 16384 channels, got 16385"):
        feature_alignment.feature_alignment_fwd(torch.zeros(1, 1, 16385), torch.zeros(1, 1, 16385), True, 0.0, True)


if __name__ == "__main__":
    complete_interpreter()
    torch.set_num_threads(1)
    for name in CASES:
        print(json.dumps({"name": name, **compared(name, "cpu")}), flush=True)
