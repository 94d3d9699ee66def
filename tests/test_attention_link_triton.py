"""The Triton kernels of cls_attention_maps and attention_link_loss without a GPU: by value, and as machine code.

Run as a script, under TRITON_INTERPRET=1, it computes the cases and prints one JSON line for each.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import data_floor, max_error, on_device, packed, value_and_grads

from fastib.reference import attention_link_loss_ref, cls_attention_maps_ref

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton_tools import (  # noqa: E402
    SHARED_LIMIT,
    compile_launch,
    complete_interpreter,
    interpreted_reports,
    launches_of,
)

from fastib.kernels.triton import attention_link, cls_attention  # noqa: E402

CLS_KERNELS = [(cls_attention, f"cls_attention_{way}_kernel") for way in ("fwd", "bwd")]
LINK_KERNELS = [(attention_link, f"attention_link_{way}_kernel") for way in ("fwd", "bwd_attn", "bwd_weight")]

# B, H, N, D, prefix, over all, dtype, packed
CLS_CASES = {
    "one patch": (2, 1, 2, 16, 1, False, torch.float32, False),
    "small": (2, 3, 17, 24, 1, False, torch.float32, True),
    "all keys": (1, 2, 19, 33, 2, True, torch.float32, False),
    "no prefix": (1, 2, 16, 8, 0, False, torch.float16, False),
    "vit": (1, 2, 197, 64, 1, False, torch.bfloat16, True),
    "several blocks": (1, 1, 300, 64, 1, True, torch.float32, True),
    "prefix longer than a block": (1, 1, 300, 64, 150, False, torch.float32, False),
}
# B, M, C, S, dtype, links: all, a random half, blocks along the diagonal and some channels without any, or uneven ones,
# whose combined maps are 0, tiny, a small difference, or of the usual size
LINK_CASES = {
    "small": (2, 5, 7, 9, torch.float32, "all"),
    "one of each": (1, 1, 1, 1, torch.float32, "all"),
    "masked": (3, 40, 50, 49, torch.float32, "half"),
    "several blocks": (2, 72, 95, 196, torch.float32, "all"),
    "bfloat16": (2, 36, 40, 70, torch.bfloat16, "half"),
    "float16": (2, 36, 40, 70, torch.float16, "all"),
    "diagonal": (2, 72, 95, 49, torch.float32, "blocks"),
    "diagonal, bfloat16": (2, 72, 95, 70, torch.bfloat16, "blocks"),
    "no maps": (3, 0, 40, 70, torch.float32, "all"),
    "no maps, masked": (3, 0, 40, 70, torch.bfloat16, "half"),
    "several launches": (5, 20, 40, 33, torch.float32, "half"),
    "uneven": (2, 40, 70, 49, torch.float32, "uneven"),
    "uneven, bfloat16": (2, 40, 70, 49, torch.bfloat16, "uneven"),
    "uneven, float16": (2, 40, 70, 49, torch.float16, "uneven"),
}


def cls_inputs(case):
    B, H, N, D, prefix, _, dtype, is_packed = CLS_CASES[case]
    torch.manual_seed(0)
    q, k = (torch.randn(B, H, N, D).to(dtype) for _ in range(2))
    if is_packed:
        q, k, _ = packed(q, k, k)
    return q[:, :, 0], k, torch.randn(B, H, N - prefix).to(dtype)


def run_cls(case, tensors):
    _, _, _, D, prefix, over_all, _, _ = CLS_CASES[case]
    q, k, grad = tensors
    maps, probs = (
        cls_attention.cls_attention_fwd(q, k, prefix, D**-0.5, over_all, maps_only) for maps_only in (True, False)
    )
    if over_all:  # as a compiled program gives it; else as an eager one does
        grad = torch.nn.functional.pad(grad, (prefix, 0))
    return maps, *cls_attention.cls_attention_bwd(grad, q, k, probs, D**-0.5)


def run_cls_reference(case, tensors):
    prefix, over_all = CLS_CASES[case][4:6]
    options = {"num_prefix_tokens": prefix, "over": "all" if over_all else "patches"}
    return value_and_grads(lambda *x: cls_attention_maps_ref(*x, **options), tensors[:2], tensors[2])


def link_inputs(case):
    B, M, C, S, dtype, links = LINK_CASES[case]
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    attn, weight = torch.randn(B, M, S).softmax(-1).to(dtype), torch.randn(C, M).to(dtype).to(wide)
    mask = None if links in ("all", "uneven") else torch.rand(C, M) > 0.5
    if links == "blocks":
        place = torch.arange(C)[:, None] * M // C
        mask = ((torch.arange(M) - place).abs() < 9) & (torch.arange(C) < C - 33)[:, None]
    bias = 0.01 * torch.randn(C)
    if M == 0:
        bias[0] = 0.0  # the only map whose length has a gradient
    if links == "uneven":
        attn[:, 1] = attn[:, 0] * (1 + torch.finfo(dtype).eps * (torch.arange(S) % 2))
        weight[::4], bias[::4] = 0.0, 0.0
        weight[1::4], bias[1::4] = (weight[1::4] * 1e-6).to(dtype), bias[1::4] * 1e-6
        weight[2], bias[2] = torch.eye(M)[1] - torch.eye(M)[0], 0.0
        weight[2:, 7:15], weight[1::4, 7] = 0.0, 2.0**-20  # a map with tiny links alone
    return attn, weight, bias, torch.randn(B, C, S).to(dtype), mask, torch.rand(B, C)


def run_link(case, tensors):
    *inputs, scale = tensors
    attention_link.MAX_IMAGES = 2 if case == "several launches" else 65535
    loss, *grads = attention_link.attention_link_both(*inputs, 1e-12)
    scaled = attention_link.attention_link_bwd(scale, *inputs, 1e-12)
    return loss, *grads, *scaled, attention_link.attention_link_fwd(*inputs, 1e-12)


def run_link_reference(case, tensors):
    attn, weight, bias, target, mask, scale = tensors

    def loss(*x):
        return attention_link_loss_ref(*x, target, mask=mask, reduction="none")

    value, *grads = value_and_grads(loss, [attn, weight, bias])
    return value, *grads, *value_and_grads(loss, [attn, weight, bias], scale)[1:], value


def compare(run, reference, tensors, device) -> dict:
    """Largest errors and their limits: twice the error of the same-precision reference, plus a floor.

    A gradient to a map, or to a channel's links, is in units of its largest element.
    """
    dtype = tensors[0].dtype
    results = run(tuple(t if t is None else on_device(t, device) for t in tensors))
    wide = tuple(t.double() if t is not None and t.is_floating_point() else t for t in tensors)
    report = {}
    for i, (got, low, exact) in enumerate(zip(results, reference(tensors), reference(wide), strict=True)):
        assert got.shape == exact.shape, f"{got.shape}, expected {exact.shape}"
        if not exact.numel():
            continue
        unit = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).smallest_normal)
        got, low, exact = got.double() / unit, low / unit, exact / unit
        rounding = 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        low_error = max_error(low, exact)  # infinite where the reference's float16 overflows
        limit = data_floor(exact, dtype) * 4 + rounding + (2 * low_error if math.isfinite(low_error) else 0.0)
        report[i] = max_error(got, exact), limit
    return {"errors": report}


def interpret_all() -> None:
    complete_interpreter()
    torch.set_num_threads(1)
    for kind, cases in (("cls", CLS_CASES), ("link", LINK_CASES)):
        for case in cases:
            print(json.dumps({"name": f"{kind} {case}", **compared(kind, case, "cpu")}), flush=True)


def compared(kind, case, device):
    inputs, run, reference = {
        "cls": (cls_inputs, run_cls, run_cls_reference), "link": (link_inputs, run_link, run_link_reference)
    }[kind]  # fmt: skip
    return compare(lambda t: run(case, t), lambda t: reference(case, t), inputs(case), device)


def check(report: dict) -> None:
    for name, (error, limit) in report["errors"].items():
        assert error <= limit, f"result {name}: error {error:.2e} above {limit:.2e}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    """Reports of all cases, computed by one process in Triton's interpreter."""
    return interpreted_reports(__file__)


ALL = [*(("cls", case) for case in CLS_CASES), *(("link", case) for case in LINK_CASES)]


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_interpreter(interpreted, kind, case):
    check(interpreted[f"{kind} {case}"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("kind", "case"), ALL)
def test_gpu(kind, case):
    check(compared(kind, case, "cuda"))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(
    ("kind", "case"),
    [("cls", "vit"), ("cls", "several blocks"), ("link", "bfloat16"), ("link", "float16"), ("link", "masked")],
)
def test_machine_code(monkeypatch, tmp_path, capability, kind, case):
    """No spills, and shared memory that the chip has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if kind == "cls":
        launches = launches_of(monkeypatch, CLS_KERNELS, lambda: run_cls(case, cls_inputs(case)))
    else:
        launches = launches_of(monkeypatch, LINK_KERNELS, lambda: run_link(case, link_inputs(case)))
    seen = set()
    for kernel, args, options in launches:
        if kernel in seen:
            continue
        seen.add(kernel)
        usage, _ = compile_launch(kernel, args, options, capability)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel.__name__} spills: {usage}"
        assert usage["SHARED"] <= SHARED_LIMIT[capability], f"{kernel.__name__}: {usage}"
    assert len(seen) == (2 if kind == "cls" else 3)


def test_large_batch(monkeypatch):
    """Only the first dimension of a grid takes more than 65535 programs."""
    attn, target = torch.zeros(70000, 1, 17), torch.zeros(70000, 2, 17)
    grids = []

    class Grids:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    for module, name in LINK_KERNELS:
        monkeypatch.setattr(module, name, Grids())
    attention_link.attention_link_both(attn, torch.ones(2, 1), torch.ones(2), target, None, 1e-12)
    assert grids and all(max(grid[1:]) <= 65535 for grid in grids)


def test_far_maps():
    """Maps so far apart that 32 bits do not reach them all are copied."""
    far = torch.empty(1, device="meta").as_strided((1, 5, 3), (1, 1 << 29, 1))
    near, _, _ = attention_link._prepare(far, torch.ones(4, 5, device="meta"), far.new_empty(1, 4, 3), None)
    assert near.stride(1) == 3


def test_nothing_to_do(monkeypatch):
    for module, name in (*CLS_KERNELS, *LINK_KERNELS):
        monkeypatch.setattr(module, name, None)
    k = torch.zeros(2, 0, 5, 8)
    probs = cls_attention.cls_attention_fwd(k[:, :, 0], k, 1, 1.0, False, False)
    assert (
        probs.shape == (2, 0, 5)
        and cls_attention.cls_attention_bwd(probs, k[:, :, 0], k, probs, 1.0)[1].shape == k.shape
    )
    assert not cls_attention.cls_attention_fwd(torch.zeros(1, 1, 8), torch.zeros(1, 1, 3, 8), 3, 1.0, False, True).any()
    inputs = torch.zeros(0, 3, 5), torch.ones(4, 3), torch.ones(4), torch.zeros(0, 4, 5), None
    loss, *grads = attention_link.attention_link_both(*inputs, 1e-12)
    assert loss.shape == (0, 4) and [g.shape for g in grads] == [(0, 3, 5), (4, 3), (4,)]
    assert not any(g.any() for g in grads)


if __name__ == "__main__":
    interpret_all()
