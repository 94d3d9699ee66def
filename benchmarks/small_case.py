"""One small forward and backward of an operator on the GPU, for a checker: `benchmarks.small_case OP [LAYOUT]`."""

from __future__ import annotations

import sys
from importlib import import_module


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print("usage: python -m benchmarks.small_case OP [LAYOUT]", file=sys.stderr)
        return 2
    op, *layout = arguments
    job = import_module(f"benchmarks.bench_{op}").small_job("cuda", *layout)
    results = job.peers[0].build()(True)
    from benchmarks.harness import check

    seen = check(job.peers[0], results, job.reference(), job.allowed)
    print(f"{job.key}: {seen.status} {seen.reason}")
    return 0 if seen.status == "ok" else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
