"""The Triton kernels of depthwise_block without a GPU: by value, and as machine code.

Run as a script, under TRITON_INTERPRET=1, it computes the cases and prints one JSON line for each.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers import data_floor, max_error, on_device, value_and_grads
from test_depthwise_block import NAMES, constants, draw

from fastib.reference import depthwise_block_ref

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import (  # noqa: E402
    SHARED_LIMIT,
    compile_launch,
    complete_interpreter,
    interpreted_reports,
    launches_of,
)

from fastib.kernels.triton import depthwise_block as kernels  # noqa: E402

KERNELS = [(kernels, f"depthwise_block_{name}_kernel")
           for name in ("act", "conv", "out", "bwd_norm2", "bwd_y", "bwd_norm1")]  # fmt: skip
# B, grid, C, dtype, evaluation
CASES = {
    "small": (3, (3, 5), 20, torch.float32, False),
    "one place": (9, (1, 1), 7, torch.float32, True),
    "tile": (2, (4, 4), 64, torch.float32, False),
    "several tiles": (2, (8, 8), 130, torch.float32, False),
    "a row": (3, (1, 40), 5, torch.float32, False),
    "several chunks": (2, (9, 17), 5, torch.float32, False),
    "evaluation": (2, (6, 7), 65, torch.float32, True),
    "bfloat16": (2, (6, 7), 65, torch.bfloat16, False),
    "float16": (2, (6, 7), 65, torch.float16, True),
}


def run(case, inputs, grad_out, statistics):
    options = (*CASES[case][1], 1e-5, 1e-5)
    out, used = kernels.depthwise_block_fwd(*inputs, statistics, *options)
    return out, *kernels.depthwise_block_bwd(grad_out, *inputs, used, statistics is None, *options)


def compared(case, device) -> dict:
    """Largest error of each result, and its limit: twice the error of the same-precision reference, plus a floor."""
    batch, grid, channels, dtype, evaluation = CASES[case]
    inputs, grad_out = draw(batch, grid, channels, dtype)
    statistics = constants(channels) if evaluation else None

    def reference(*x):
        return depthwise_block_ref(*x, grid, statistics=None if statistics is None else statistics.to(x[1]))[0]

    place = [on_device(t, device) for t in (*inputs, grad_out)]
    results = run(case, place[:-1], place[-1], None if statistics is None else on_device(statistics, device))
    low = value_and_grads(reference, inputs, grad_out)
    exact = value_and_grads(reference, [t.double() for t in inputs], grad_out.double())
    report = {}
    for name, *values in zip(("out", *NAMES), results, low, exact, strict=True):
        got, same, true = values
        assert got.shape == true.shape, f"{name}: {got.shape}, expected {true.shape}"
        rounding = 32 * torch.finfo(torch.float32).eps * max(1.0, true.abs().max().item())
        report[name] = max_error(got, true), 2 * max_error(same, true) + 4 * data_floor(true, got.dtype) + rounding
    return report


def interpret_all() -> None:
    complete_interpreter()
    torch.set_num_threads(1)
    for case in CASES:
        print(json.dumps({"name": case, "errors": compared(case, "cpu")}), flush=True)


@pytest.fixture(scope="session")
def interpreted():
    return interpreted_reports(__file__)


def judge(report: dict) -> None:
    for name, (error, limit) in report.items():
        assert error <= limit, f"{name}: error {error:.3e} > {limit:.3e}"


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, interpreted):
    judge(interpreted[case]["errors"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    judge(compared(case, "cuda"))


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [*((torch.bfloat16, capability) for capability in SHARED_LIMIT), (torch.float32, 90)], ids=str,
)  # fmt: skip
def test_machine_code(dtype, capability, monkeypatch):
    """Compiled ahead of time: no register spills, shared memory that the chip has."""
    inputs, grad_out = draw(1, (14, 14), 768, dtype)

    def step():
        _, used = kernels.depthwise_block_fwd(*inputs, None, 14, 14, 1e-5, 1e-5)
        kernels.depthwise_block_bwd(grad_out, *inputs, used, True, 14, 14, 1e-5, 1e-5)

    seen = set()
    for kernel, args, options in launches_of(monkeypatch, KERNELS, step):
        variant = kernel.fn.__name__, options.get("CONV"), options.get("ACT")
        if variant in seen:
            continue
        seen.add(variant)
        usage, _ = compile_launch(kernel, args, options, capability)
        assert usage["LOCAL"] == 0 and usage["STACK"] == 0, f"{variant} spills: {usage}"
        assert usage["SHARED"] <= SHARED_LIMIT[capability]
    assert len(seen) == 8


if __name__ == "__main__":
    interpret_all()
