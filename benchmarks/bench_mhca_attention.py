"""`mhca_attention` against eager code, torch.compile, scaled_dot_product_attention and FlexAttention."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.house import Goal, Job
from benchmarks.peers.mhca_attention import Case, Inputs, allowed, peers, reference
from benchmarks.replay import REPLAY

OP = "mhca_attention"
CPU_SHAPES = ((32, 12, 14, 16), (32, 12, 14, 32), (16, 16, 14, 48))  # B, H, side of the grid, D
CUDA_SHAPES = tuple((256, heads, grid, dim) for grid in (14, 24) for heads, dim in ((12, 32), (12, 16), (16, 48)))
MEMORY_SHAPES = tuple((1, 4, grid, 16) for grid in (14, 28, 56))
MODES = (("train", 0.0), ("train", 0.1), ("forward", 0.0))


def cases(device: str, layout: str = "dense") -> list[Case]:
    """The rows of the table, the most telling ones first."""
    if device == "cuda":
        timed = [
            Case(*shape, "bfloat16", mode, drop, device, layout)
            for mode, drop in (("train", 0.0), ("forward", 0.0), ("train", 0.1))
            for shape in CUDA_SHAPES
        ]
    else:
        timed = [
            Case(*shape, dtype, mode, drop, device, layout)
            for shape, dtype, (mode, drop) in itertools.product(CPU_SHAPES, ("float32", "bfloat16"), MODES)
        ]
    dtype = "bfloat16" if device == "cuda" else "float32"
    return timed + [Case(*shape, dtype, "memory", 0.0, device, layout) for shape in MEMORY_SHAPES]


def goals(case: Case) -> tuple[Goal, ...]:
    """What the operator is meant to reach, as a bound on our time over a peer's."""
    if case.mode == "memory":
        return ()
    if case.device == "cuda":
        return (Goal(1.0, ("sdpa no bias flash",)), Goal(0.5, ("flex",)))
    if case.mode == "forward":
        return (Goal(0.85, ("sdpa mask", "sdpa mask compiled")),) if case.dtype == "float32" else ()
    if case.dtype == "float32":
        return (Goal(0.85 if case.rpe_dropout else 0.75, ("sdpa no bias",)),)
    own_float32 = Case(**{**vars(case), "dtype": "float32"}).key
    return (
        Goal(0.45, ("eager", "sdpa no bias")),
        Goal(1.0, ("fastib",), case=own_float32),
    )


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; the large ones of the memory table and quick runs go without compiled peers."""
    inputs = Inputs(case)
    chosen = peers(inputs, backend)
    if quick or case.mode == "memory":
        chosen = [peer for peer in chosen if "compiled" not in peer.name and peer.name != "flex"]
    return Job(
        key=case.key,
        op=OP,
        mode=case.mode,
        device=case.device,
        describe={
            "shape": {"B": case.B, "H": case.H, "N": case.N, "D": case.D},
            "dtype": case.dtype,
            "rpe_dropout": case.rpe_dropout,
            "layout": case.layout,
            "backend": backend or "auto",
        },
        peers=chosen,
        reference=lambda: reference(inputs),
        allowed=allowed(case.dtype, case.trains),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=goals(case),
        release=inputs.release,
        **({"seconds": 1.0, "min_rounds": 2, "max_rounds": 2} if case.mode == "memory" else {}),
        **({"seconds": 2.0} if case.device == "cuda" and case.mode != "memory" else {}),
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker, with dropout and a grid that fills no tile."""
    return make_job(Case(2, 3, 5, 24, "bfloat16", "train", 0.1, device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    backend, quick = config.getoption("--bench-backend"), config.getoption("--quick")
    return [make_job(case, backend, quick) for case in cases(device, config.getoption("--bench-layout"))]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_mhca_attention(job, peer, run_peer):
    run_peer(job, peer)
