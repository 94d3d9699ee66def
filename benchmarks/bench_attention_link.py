"""`cls_attention_maps` and `attention_link_loss` against eager and compiled PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.harness import repeated_calls
from benchmarks.house import Goal, Job
from benchmarks.peers.attention_link import Case, Inputs, peers, reference
from benchmarks.replay import REPLAY

CPU_SIZES = {"cls_attention": (64, 6, 197, 64), "attention_link": (64, 72, 952, 196)}
CUDA_SIZES = {"cls_attention": (256, 6, 197, 64), "attention_link": (256, 72, 952, 196)}


def cases(device: str) -> list[Case]:
    """The rows of the table."""
    sizes = CUDA_SIZES if device == "cuda" else CPU_SIZES
    variants = itertools.product(sizes, ("float32", "bfloat16"), ("train", "forward"))
    plain = [Case(op, sizes[op], dtype, mode, device=device) for op, dtype, mode in variants]
    masked = Case("attention_link", sizes["attention_link"], "float32", "train", True, device)
    if device == "cuda":  # whose timer empties the caches
        return [*plain, masked]
    repeated = (case for case in plain if case.op == "cls_attention" and case.dtype == "float32")
    return [*plain, *(replace(case, repeated=True) for case in repeated), masked]


def goals(case: Case) -> tuple[Goal, ...]:
    """What the operator is meant to reach, as a bound on our time over a peer's."""

    def other(**changes) -> str:
        return Case(**{**vars(case), **changes}).key

    if case.masked:
        return (Goal(1.0, ("fastib",), case=other(masked=False)),)
    if case.device == "cuda":
        return (Goal(1 / 3, ("eager compiled",)),)
    if case.repeated:
        return (Goal(2.5 if case.trains else 0.7, ()),)
    if case.dtype == "bfloat16":
        return (Goal(1 / 1.5, ("fastib",), case=other(dtype="float32")),) if case.op == "attention_link" else ()
    bounds = {"cls_attention": (2.5 / 4.2, 0.7 / 0.9), "attention_link": (45 / 111, 18 / 31)}
    return (Goal(bounds[case.op][not case.trains], ("eager compiled",)),)


def make_job(case: Case, backend: str | None, quick: bool) -> Job:
    """A case with its peers; quick runs go without compiled peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=case.op,
        mode=case.mode,
        device=case.device,
        describe={
            "shape": dict(zip(case.names, case.sizes, strict=True)),
            "dtype": case.dtype,
            "masked": case.masked,
            "repeated": case.repeated,
            "backend": backend or "auto",
        },
        peers=[peer for peer in peers(inputs, backend) if not (quick and "compiled" in peer.name)],
        reference=lambda: reference(inputs),
        allowed=case.allowed(),
        flops=case.flops(),
        bytes=case.bytes(),
        goals=goals(case),
        timer=repeated_calls if case.repeated else None,
        release=inputs.release,
        **({"seconds": 2.0} if case.device == "cuda" else {}),
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker, with sizes that fill no tile."""
    return make_job(Case("attention_link", (2, 5, 7, 9), "bfloat16", "train", True, device), None, quick=True)


def jobs(device: str, config) -> list[Job]:
    return [make_job(case, config.getoption("--bench-backend"), config.getoption("--quick")) for case in cases(device)]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_attention_link(job, peer, run_peer):
    run_peer(job, peer)
