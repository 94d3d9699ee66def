"""Measures the cases of a session, keeps their results, and hands them to pytest-benchmark."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ceilings import measure_ceilings, shares
from benchmarks.harness import CudaTimer, Measurement, Peer, Step, Unavailable, admit, cpu_timer, interleave
from benchmarks.machine import describe, device_slug
from benchmarks.memory import peak_extra_bytes
from benchmarks.replay import REPLAY


@dataclass(frozen=True)
class Goal:
    """`limit` bounds our median over the fastest of `against`, peers of this case or of the case named `case`.

    With nothing in `against` it bounds our median in milliseconds.
    """

    limit: float
    against: tuple[str, ...]
    case: str = ""


@dataclass
class Job:
    """One case of an operator's benchmark.

    describe: shape, dtype and what else names the case. peers: all of them, the first one is ours. reference: the right
    results, in the order of `allowed`, which holds the relative error that the gate lets pass.
    flops, bytes: the least work of the case, the same for every peer. 0 where a rate says nothing.
    """

    key: str
    op: str
    mode: str
    device: str
    describe: dict
    peers: Sequence[Peer]
    reference: Callable[[], Sequence[Tensor]]
    allowed: dict[str, float]
    flops: float = 0.0
    bytes: float = 0.0
    goals: tuple[Goal, ...] = ()
    seconds: float = 10.0
    min_rounds: int = 9
    max_rounds: int = 100
    memory: bool = True
    timer: Callable[[Step], float] | None = None  # milliseconds of a step, where the device's own timer does not do
    release: Callable[[], None] = lambda: None  # lets go of the inputs once the job is measured

    def __repr__(self) -> str:
        return self.key


@dataclass
class Options:
    """Of one session: seconds per case (None: the case's own), all seconds, quick, where the results go.

    suffix: of the results' file, for a session whose process is set up in a way of its own.
    """

    seconds: float | None = None
    budget: float | None = None
    quick: bool = False
    backend: str | None = None
    results: Path = Path("benchmarks/results")
    suffix: str = ""


@dataclass
class House:
    """Results of this session by case, written to `<results>/<device>.json` after each case."""

    options: Options
    start: float = field(default_factory=time.monotonic)
    seen: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    ceilings: dict[str, dict] = field(default_factory=dict)
    written: set[Path] = field(default_factory=set)

    def time_left(self) -> float:
        """Seconds of the budget that are left."""
        spent = time.monotonic() - self.start
        return float("inf") if self.options.budget is None else self.options.budget - spent

    def ceilings_of(self, device: str) -> dict:
        """The ceilings of this device, measured once."""
        if device not in self.ceilings:
            self.ceilings[device] = measure_ceilings(device)
        return self.ceilings[device]

    def hurried(self, peer: Peer) -> Peer:
        """The peer; in the second half of the session's time, one that is slow to build is listed as left out."""
        if not peer.slow_to_build or self.time_left() > 0.5 * (self.options.budget or 0):
            return peer

        def left_out():
            raise Unavailable(f"left out to end within {self.options.budget:g} s")

        return replace(peer, build=left_out)

    def measure(self, job: Job, wanted: Sequence[str]) -> dict[str, Measurement]:
        """Checks and times the wanted peers of a job, interleaved; the first call does the work.

        Results of a job of which only some peers are wanted are not written: its ratios would be lost.
        """
        if job.key in self.seen:
            return self.seen[job.key]
        if self.time_left() < 0:
            raise Unavailable(f"the session's {self.options.budget:g} s are used up")
        ceilings = self.ceilings_of(job.device)
        peers = [self.hurried(peer) for peer in job.peers if peer.name in wanted]
        steps, seen = admit(peers, job.reference(), job.allowed)
        cuda = job.device == "cuda"
        timer = job.timer or (CudaTimer() if cuda else cpu_timer)
        limits = {"seconds": self.options.seconds or job.seconds, "min_rounds": job.min_rounds}
        if self.options.quick:
            limits = {"seconds": min(2.0, limits["seconds"]), "min_rounds": 3}
        samples = interleave(steps, timer, max_rounds=job.max_rounds, **limits)
        for name, step in steps.items():
            seen[name].samples_ms = samples[name]
            if isinstance(timer, CudaTimer):
                seen[name].host_us = min(timer.host_us[id(step)])
            if job.memory:
                seen[name].peak_extra_bytes = peak_extra_bytes(lambda step=step: step(False), job.device)
        steps.clear()
        job.release()
        torch._dynamo.reset()
        if cuda:
            torch.cuda.empty_cache()
        self.seen[job.key] = seen
        if len(peers) == len(job.peers):
            self.write(job, seen, ceilings)
        return seen

    def entry(self, job: Job, seen: Measurement, ceilings: dict) -> dict:
        """What is kept of one peer: quantiles, rates, shares of the ceilings, error, memory, host time."""
        result = seen.as_dict()
        if job.mode == "host" and seen.samples_ms:
            result["host_us"] = seen.median_ms * 1e3
        if seen.samples_ms and job.flops:
            rate = {"gflops": job.flops / seen.median_ms * 1e-6, "gbps": job.bytes / seen.median_ms * 1e-6}
            result |= rate | {"shares": shares(rate["gflops"], rate["gbps"], job.describe.get("dtype", ""), ceilings)}
        return result

    def write(self, job: Job, seen: dict[str, Measurement], ceilings: dict) -> None:
        """Puts this case into the device's results; other cases stay, each with the commit it was measured at."""
        path = self.options.results / f"{device_slug(job.device)}{self.options.suffix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(path.read_text()) if path.exists() else {"cases": {}}
        machine = describe(job.device)
        stored |= {"machine": machine, "ceilings": ceilings}
        stored["cases"][job.key] = {
            "op": job.op,
            "mode": job.mode,
            **job.describe,
            "allowed_error": job.allowed,
            "commit": machine["commit"],
            "time": machine["time"],
            "quick": self.options.quick,
            "ours": job.peers[0].name,
            "goals": [{"limit": goal.limit, "against": list(goal.against), "case": goal.case} for goal in job.goals],
            "peers": {name: self.entry(job, measured, ceilings) for name, measured in seen.items()},
        }
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(stored, indent=1) + "\n")
        partial.replace(path)
        self.written.add(path)

    def replay(self, benchmark, job: Job, peer: str) -> Measurement:
        """Gives one peer's samples and facts to the `benchmark` fixture of pytest-benchmark."""
        seen = self.seen[job.key][peer]
        benchmark.group = job.key
        ceilings = self.ceilings_of(job.device)
        benchmark.extra_info.update(
            describe(job.device),
            op=job.op,
            mode=job.mode,
            peer=peer,
            **job.describe,
            ceilings=ceilings,
            **self.entry(job, seen, ceilings),
        )
        if seen.status == "ok":
            REPLAY.into(benchmark, seen.samples_ms)
        return seen
