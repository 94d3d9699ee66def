"""Recorded times in pytest-benchmark's own table."""

from __future__ import annotations

from collections.abc import Sequence


class Replay:
    """A clock that shows recorded durations, so that pytest-benchmark's own table holds the interleaved samples."""

    def __init__(self):
        self._now = 0.0

    def now(self) -> float:
        """The timer to give to pytest-benchmark, in seconds."""
        return self._now

    def into(self, benchmark, samples_ms: Sequence[float]) -> None:
        """Feeds every sample to the `benchmark` fixture as one round of one iteration."""
        durations = iter(samples_ms)

        def advance():
            self._now += next(durations, 0.0) * 1e-3

        benchmark.pedantic(advance, rounds=len(samples_ms), iterations=1, warmup_rounds=0)


REPLAY = Replay()
