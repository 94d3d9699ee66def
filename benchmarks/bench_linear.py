"""The linear layer's own products, in float32 on the CPU, against PyTorch's: the two of DAFF in DHVT-T and DHVT-S."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.house import Job
from benchmarks.peers.linear import Case, Inputs, peers
from benchmarks.replay import REPLAY

OP = "linear"
SHAPES = ((128, 8, 192), (32, 16, 384))  # B, side, dim


def cases(device: str) -> list[Case]:
    """The rows of the table; there is nothing of ours on a GPU."""
    if device == "cuda":
        return []
    widths = ((1, 4), (4, 1))  # into and out of the hidden channels
    return [
        Case(batch, side, dim * i, dim * o, mode)
        for mode, (batch, side, dim), (i, o) in itertools.product(("train", "forward"), SHAPES, widths)
    ]


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; quick runs go without compiled peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP,
        mode=case.mode,
        device="cpu",
        describe={
            "shape": {"B": case.B, "side": case.side, "I": case.inner, "O": case.outer},
            "dtype": "float32",
            "backend": backend or "auto",
        },
        peers=[peer for peer in peers(inputs) if not (quick and "compiled" in peer.name)],
        reference=inputs.reference,
        allowed=case.allowed(),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=(),
        release=inputs.release,
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker, with channels that fill no vector."""
    return make_job(Case(2, 3, 20, 33, "train"), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_linear(job, peer, run_peer):
    run_peer(job, peer)
