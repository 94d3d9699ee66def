"""`generalized_conv` against the shift in eager and compiled, a dense convolution, and the published dense matrices."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.house import Goal, Job
from benchmarks.peers.generalized_conv import Case, Inputs, peers, reference
from benchmarks.replay import REPLAY

OP = "generalized_conv"
SHAPES = ((288, 9, 14), (288, 9, 28), (384, 6, 14))  # C, H, side: Agent-S late and early, Agent-B
BATCH = {"cpu": 16, "cuda": 256}


def cases(device: str) -> list[Case]:
    """The rows of the table, the most telling ones first."""
    batch = BATCH[device]
    whole = itertools.product(SHAPES, ("float32", "bfloat16"), ("channels_last", "contiguous"), ("train", "forward"))
    shift = itertools.product(SHAPES[:2], ("float32", "bfloat16"), ("channels_last", "contiguous"))
    return [
        *(Case(batch, *shape, dtype, mode, layout, device=device) for shape, dtype, layout, mode in whole),
        *(Case(batch, *shape, dtype, "forward", layout, "shift", device) for shape, dtype, layout in shift),
    ]


def goals(case: Case) -> tuple[Goal, ...]:
    """Bounds on our time over that of the compiled shift, which took 22.6 and 8.1 ms where 17 and 6 were asked for, and
    over the published way's. The shift's goal, on a GPU, is a share of the copy bandwidth, which the table shows."""
    if case.device == "cuda" or case.part == "shift" or case.dtype != "float32" or case.side > 14 or case.H != 9:
        return ()
    return (Goal(17 / 22.6 if case.trains else 6 / 8.1, ("eager compiled",)), Goal(1 / 5, ("dense phi",)))


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; quick runs go without compiled peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP if case.part == "conv" else f"{OP}_shift",
        mode=case.mode,
        device=case.device,
        describe={
            "shape": {"B": case.B, "C": case.C, "H": case.H, "side": case.side},
            "dtype": case.dtype,
            "layout": case.layout,
            "backend": backend or "auto",
        },
        peers=[peer for peer in peers(inputs, backend) if not (quick and "compiled" in peer.name)],
        reference=lambda: reference(inputs),
        allowed=case.allowed(),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=goals(case),
        release=inputs.release,
        **({"seconds": 2.0} if case.device == "cuda" else {}),
    )


def small_job(device: str, layout: str = "contiguous") -> Job:
    """A case small enough for a memory checker, with rows and columns that fill no tile."""
    return make_job(Case(2, 27, 9, 5, "bfloat16", "train", layout=layout, device=device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_generalized_conv(job, peer, run_peer):
    run_peer(job, peer)
