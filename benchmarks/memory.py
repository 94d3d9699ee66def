"""Peak memory of one step beyond what was allocated before it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def allocation_peak(events: list[dict]) -> int:
    """Highest running sum of the bytes that a trace's allocations and frees record, in the order of time."""
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type", 0) == 0
    ]
    running = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        running += size
        peak = max(peak, running)
    return peak


def peak_extra_bytes(step: Callable[[], object], device: str) -> int:
    """Peak bytes that a step's tensors take beyond those that lived before it.

    On a GPU the caching allocator counts. On the CPU a profiler's trace of torch's allocator does: it sees every tensor
    that torch allocates, but not what a library takes from the system by itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    return allocation_peak(events)
