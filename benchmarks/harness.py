"""Peers of one case, checked against a reference and timed interleaved in one run."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor


class Unavailable(Exception):
    """A peer cannot run this case; the message is the reason that the tables show."""


Step = Callable[[bool], "tuple[Tensor, ...]"]


@dataclass
class Peer:
    """One way to compute a case.

    build: returns `step(checking)`, which does the work once and returns what the reference returns, in its order.
        With `checking` the step uses the case's shared random mask; without, it draws a new one, as training does.
        Raises Unavailable where the peer cannot run.
    gated: whether results must agree with the reference. A peer that computes less only has to be finite.
    slow_to_build: left out first where a session's time is short.
    """

    name: str
    build: Callable[[], Step]
    gated: bool = True
    note: str = ""
    slow_to_build: bool = False


@dataclass
class Measurement:
    """What was seen of one peer; times in milliseconds."""

    status: str = "ok"  # ok | wrong | unavailable
    reason: str = ""
    note: str = ""
    samples_ms: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # per result, relative to the reference's norm
    max_error: float | None = None  # largest absolute difference of the first result
    host_us: float | None = None
    peak_extra_bytes: int | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    def as_dict(self) -> dict:
        """Everything but the samples, plus their quantiles; spread is (80 % quantile - 20 % quantile) / median."""
        result = {key: value for key, value in asdict(self).items() if key not in ("samples_ms", "errors")}
        if self.errors:
            result["error"] = max(self.errors)
        if self.samples_ms:
            low, high = quantile(self.samples_ms, 0.2), quantile(self.samples_ms, 0.8)
            result |= {
                "median_ms": self.median_ms,
                "min_ms": min(self.samples_ms),
                "q20_ms": low,
                "q80_ms": high,
                "spread": (high - low) / self.median_ms,
                "rounds": len(self.samples_ms),
            }
        return result


def quantile(samples: Sequence[float], share: float) -> float:
    """Linearly interpolated quantile, share in [0, 1]."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def relative_error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference|| in float64; infinite where the result holds a NaN or the shape is off."""
    if result.shape != reference.shape:
        return math.inf
    reference = reference.double()
    error = (result.detach().double() - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return error.item() if torch.isfinite(error) else math.inf


def check(peer: Peer, results: Sequence[Tensor], reference: Sequence[Tensor], allowed: dict[str, float]) -> Measurement:
    """The correctness gate: a Measurement whose status says whether this peer may be timed.

    allowed: name of each result, in order, and the largest `relative_error` it may have.
    """
    seen = Measurement(note=peer.note)
    if not peer.gated:
        if not all(torch.isfinite(result).all() for result in results):
            seen.status, seen.reason = "wrong", "the result is not finite"
        return seen
    if len(results) != len(reference):
        seen.status, seen.reason = "wrong", f"{len(results)} results where the reference has {len(reference)}"
        return seen
    seen.errors = [relative_error(result, expected) for result, expected in zip(results, reference, strict=True)]
    if results[0].shape == reference[0].shape and results[0].numel():
        seen.max_error = (results[0].detach().double() - reference[0].double()).abs().max().item()
    excess = {name: error / allowed[name] for name, error in zip(allowed, seen.errors, strict=False)}
    worst = max(excess, key=excess.__getitem__)
    if not excess[worst] <= 1:
        seen.status = "wrong"
        seen.reason = f"error of {worst} {excess[worst] * allowed[worst]:.1e}, allowed {allowed[worst]:.0e}"
    return seen


def one_line(error: BaseException) -> str:
    """The first line of an exception, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def admit(
    peers: Sequence[Peer], reference: Sequence[Tensor], allowed: dict[str, float]
) -> tuple[dict[str, Step], dict[str, Measurement]]:
    """Builds and checks every peer; returns the steps that may be timed and a Measurement for each peer."""
    steps, seen = {}, {}
    for peer in peers:
        try:
            step = peer.build()
            seen[peer.name] = check(peer, step(True), reference, allowed)
        except Exception as error:
            # Whatever a peer throws is this peer's result: the others are still measured.
            reason = one_line(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {one_line(error)}"
            seen[peer.name] = Measurement(status="unavailable", reason=reason, note=peer.note)
            continue
        if seen[peer.name].status == "ok":
            steps[peer.name] = step
    return steps, seen


def interleave(
    steps: dict[str, Step],
    timer: Callable[[Step], float],
    *,
    seconds: float = 10.0,
    min_rounds: int = 9,
    max_rounds: int = 100,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Round-robin timing: each round times every step once, in an order drawn anew, so that none always finds in the
    caches what the same other one has left there. The draws are the same in every run.

    Rounds are as many as fit `seconds`, within the limits. A step that alone would take more than half of `seconds` in
    `min_rounds` is timed in three rounds only. Returns milliseconds per step.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    first = {name: timer(step) for name, step in steps.items()}
    slow = {name for name, duration in first.items() if duration * min_rounds > 500 * seconds}
    order, draw = list(steps), random.Random(0)
    for _ in range(warmup - 1):
        for name in order:
            if name not in slow:
                timer(steps[name])
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while order and done < max_rounds:
            if done >= min_rounds and time.perf_counter() - start > seconds * done / (done + 1):
                break
            if done == 3:
                order = [name for name in order if name not in slow]
                start = time.perf_counter()
                if not order:
                    break
            for name in draw.sample(order, len(order)):
                samples[name].append(timer(steps[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def cpu_timer(step: Step) -> float:
    """Milliseconds of one step by the host's clock."""
    start = time.perf_counter()
    step(False)
    return (time.perf_counter() - start) * 1e3


def repeated_calls(step: Step, calls: int = 20, seconds: float = 0.25) -> float:
    """Milliseconds of a step that follows others of its kind: the median of `calls`, or of those that fit `seconds`."""
    times, end = [cpu_timer(step)], time.perf_counter() + seconds
    while len(times) < calls and time.perf_counter() < end:
        times.append(cpu_timer(step))
    return statistics.median(times)


def backlog_cycles(host_us: Sequence[float]) -> int:
    """Cycles to sleep while a step is enqueued: at about 2 GHz a millisecond, or twice its fastest enqueueing so far.

    Not its slowest: one that compiles would make every later round wait as long.
    """
    return max(2_000_000, min(int(min(host_us, default=0.0) * 4e3), 100_000_000))


class CudaTimer:
    """Milliseconds of one step by device events, with a cold L2.

    Writing a buffer larger than the L2, and then a sleep kernel, keep the device busy while the host enqueues the step:
    the events are then not spread apart by the host's launch cost. `host_us` collects that cost.
    """

    def __init__(self, device: torch.device | str = "cuda"):
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
        self.host_us: dict[int, list[float]] = {}

    def __call__(self, step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(backlog_cycles(self.host_us.get(id(step), ())))
        start.record()
        begun = time.perf_counter()
        step(False)
        host = time.perf_counter() - begun
        end.record()
        torch.cuda.synchronize()
        self.host_us.setdefault(id(step), []).append(host * 1e6)
        return start.elapsed_time(end)
