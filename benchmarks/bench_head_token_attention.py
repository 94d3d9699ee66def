"""`head_token_attention` against eager code, torch.compile, and scaled_dot_product_attention on joined tokens."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.house import Goal, Job
from benchmarks.peers.head_token_attention import Case, Inputs, allowed, peers, reference
from benchmarks.replay import REPLAY

OP = "head_token_attention"
SHAPES = ((8, 257, 8, 48), (4, 65, 4, 48), (6, 197, 6, 64))  # H, N, T, D: DHVT-S patch 2, DHVT-T patch 4, 224
CPU_BATCHES = (32, 128, 16)
SAME_FUNCTION = ("eager", "eager compiled", "sdpa joined", "sdpa joined compiled")


def cases(device: str) -> list[Case]:
    """The rows of the table, the most telling ones first."""
    if device == "cuda":
        return [
            Case(512, *shape, dtype, mode, device)
            for mode, dtype, shape in itertools.product(("train", "forward"), ("bfloat16", "float32"), SHAPES)
        ]
    return [
        Case(batch, *shape, dtype, mode)
        for mode, (batch, shape), dtype in itertools.product(
            ("train", "forward"), zip(CPU_BATCHES, SHAPES, strict=True), ("float32", "bfloat16")
        )
    ]


def goals(case: Case) -> tuple[Goal, ...]:
    """What the operator is meant to reach, as a bound on our time over a peer's."""
    if not case.trains:
        return ()
    if case.dtype == "bfloat16":
        return (Goal(0.5, SAME_FUNCTION),)
    return (Goal(0.85, ("sdpa no extra",)), Goal(0.5, ("eager",)))


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; quick runs go without compiled peers."""
    inputs = Inputs(case)
    chosen = [peer for peer in peers(inputs, backend) if not (quick and "compiled" in peer.name)]
    return Job(
        key=case.key,
        op=OP,
        mode=case.mode,
        device=case.device,
        describe={
            "shape": {"B": case.B, "H": case.H, "N": case.N, "T": case.T, "D": case.D},
            "dtype": case.dtype,
            "backend": backend or "auto",
        },
        peers=chosen,
        reference=lambda: reference(inputs),
        allowed=allowed(case.dtype, case.trains),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=goals(case),
        release=inputs.release,
        **({"seconds": 2.0} if case.device == "cuda" else {}),
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker, with tokens that fill no tile."""
    return make_job(Case(2, 3, 26, 3, 24, "bfloat16", "train", device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_head_token_attention(job, peer, run_peer):
    run_peer(job, peer)
