"""`feature_alignment_loss` against the reference and `layer_norm` with `mse_loss`, plain and compiled."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.house import Goal, Job
from benchmarks.peers.feature_alignment import Case, Inputs, peers
from benchmarks.replay import REPLAY

OP = "feature_alignment"
SHAPES = ((196, 784, 288), (196, 196, 288))  # tokens of the ViT and of the agent CNN early and late, channels
BATCH = {"cpu": 64, "cuda": 256}


def cases(device: str) -> list[Case]:
    """The rows of the table, the most telling ones first."""
    variants = itertools.product(("train", "forward"), SHAPES, ("float32", "bfloat16"))
    return [Case(BATCH[device], *shape, dtype, mode, device) for mode, shape, dtype in variants]


def goals(case: Case) -> tuple[Goal, ...]:
    """What the operator is meant to reach, as a bound on our time over a peer's; its share of the copy bandwidth is in
    the table."""
    if case.N == case.M:
        return ()
    return (Goal(1 / 3, ("eager", "two norms")), Goal(1 / 1.3, ("eager compiled", "two norms compiled")))


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; quick runs go without compiled peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP,
        mode=case.mode,
        device=case.device,
        describe={
            "shape": {"B": case.B, "N": case.N, "M": case.M, "C": case.C},
            "dtype": case.dtype,
            "backend": backend or "auto",
        },
        peers=[peer for peer in peers(inputs, backend) if not (quick and "compiled" in peer.name)],
        reference=inputs.reference,
        allowed=case.allowed(),
        flops=1.0,
        bytes=case.bytes(),
        goals=() if quick else goals(case),
        release=inputs.release,
        **({"seconds": 2.0} if case.device == "cuda" else {}),
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker, with tokens and channels that fill no tile."""
    return make_job(Case(2, 5, 15, 37, "bfloat16", "train", device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_feature_alignment(job, peer, run_peer):
    run_peer(job, peer)
