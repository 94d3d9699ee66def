"""`fastib.nn.DAFF` against its layers one by one, on channels_last and on contiguous maps, and compiled."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.house import Goal, Job
from benchmarks.peers.daff import Case, Inputs, allowed, peers, reference
from benchmarks.replay import REPLAY

OP = "daff"
SIZES = ((192, 8), (192, 14))  # DHVT-T: dim, side


def cases(device: str) -> list[Case]:
    """The rows of the table, the most telling ones first."""
    batch = 512 if device == "cuda" else 128
    variants = itertools.product(("train", "forward"), SIZES, ("float32", "bfloat16"))
    return [Case(batch, dim, side, dtype, mode, device) for mode, (dim, side), dtype in variants]


def goals(case: Case) -> tuple[Goal, ...]:
    """What the module is meant to reach, as a bound on our time over a peer's."""
    if case.device == "cuda" or not case.trains or case.dtype != "float32":
        return ()
    return (Goal(1 / 1.5, ("eager", "eager contiguous")),)


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; quick runs go without compiled peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP,
        mode=case.mode,
        device=case.device,
        describe={
            "shape": {"B": case.B, "D": case.dim, "side": case.side},
            "dtype": case.dtype,
            "backend": backend or "auto",
        },
        peers=[peer for peer in peers(inputs, backend) if not (quick and "compiled" in peer.name)],
        reference=lambda: reference(inputs),
        allowed=allowed(case.dtype, case.trains),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=goals(case),
        release=inputs.release,
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker, with channels that fill no vector."""
    return make_job(Case(2, 20, 3, "float32", "train", device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_daff(job, peer, run_peer):
    run_peer(job, peer)
