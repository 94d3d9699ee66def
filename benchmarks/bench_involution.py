"""`involution` against unfolding, a sum of shifted products, both compiled, and a depthwise convolution."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.harness import repeated_calls
from benchmarks.house import Goal, Job
from benchmarks.peers.involution import Case, Inputs, allowed, peers, reference
from benchmarks.replay import REPLAY

OP = "involution"
CPU_SHAPES = ((8, 64, 56), (8, 128, 28), (8, 256, 14))  # B, C, side
CUDA_SHAPES = (  # of RedNet-50: C, side, K, stride
    (64, 56, 7, 1), (128, 28, 7, 1), (256, 14, 7, 1), (512, 7, 7, 1), (128, 56, 7, 2), (256, 28, 7, 2), (512, 14, 7, 2),
    (32, 112, 3, 1),
)  # fmt: skip
LAYOUTS = ("contiguous", "channels_last")


def cases(device: str) -> list[Case]:
    """The rows of the table, the most telling ones first."""
    if device == "cuda":
        variants = itertools.product(("train", "forward"), LAYOUTS, ("bfloat16", "float32"), CUDA_SHAPES)
        return [
            Case(256, channels, side, dtype, mode, kernel, stride, layout, device)
            for mode, layout, dtype, (channels, side, kernel, stride) in variants
        ]
    variants = itertools.product(("train", "forward"), LAYOUTS, CPU_SHAPES, ("float32", "bfloat16"))
    plain = [Case(*shape, dtype, mode, layout=layout) for mode, layout, shape, dtype in variants]
    return [*plain, *(replace(case, repeated=True) for case in plain if case.trains)]


def goals(case: Case) -> tuple[Goal, ...]:
    """What the operator is meant to reach, as a bound on our time over a peer's. On a GPU its goal is a share of the
    copy bandwidth, which the table shows."""
    if case.device == "cuda" or not case.trains:
        return ()
    if case.dtype == "bfloat16":
        return (Goal(1 / 1.3, ("fastib",), case=replace(case, dtype="float32").key),)
    return (Goal(1 / 40, ("eager",)), Goal(1 / 10, ("eager compiled", "shifted", "shifted compiled")))


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
            "shape": {"B": case.B, "C": case.C, "side": case.side, "K": case.K, "stride": case.stride},
            "dtype": case.dtype,
            "layout": case.layout,
            "repeated": case.repeated,
            "backend": backend or "auto",
        },
        peers=chosen,
        reference=lambda: reference(inputs),
        allowed=allowed(case.dtype, case.trains),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=goals(case),
        timer=repeated_calls if case.repeated else None,
        release=inputs.release,
        **({"seconds": 2.0} if case.device == "cuda" else {}),
    )


def small_job(device: str, layout: str = "contiguous") -> Job:
    """A case small enough for a memory checker, with rows and columns that fill no tile."""
    return make_job(Case(2, 32, 9, "bfloat16", "train", layout=layout, device=device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_involution(job, peer, run_peer):
    run_peer(job, peer)
