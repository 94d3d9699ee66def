"""Options, the session's house, and the collection of bench_*.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.harness import Unavailable  # noqa: E402
from benchmarks.house import House, Options  # noqa: E402
from benchmarks.report import publish  # noqa: E402
from fastib.train.host_memory import keep_freed_memory  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("fastib benchmarks")
    group.addoption("--quick", action="store_true", help="few rounds per case, and no compiled peers")
    group.addoption("--bench-seconds", type=float, help="seconds of timing per case")
    group.addoption("--bench-budget", type=float, help="seconds after which no further case is begun")
    group.addoption("--bench-device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it is")
    group.addoption("--bench-backend", help="backend of our operators, their own choice by default")
    group.addoption("--bench-layout", choices=("dense", "packed"), default="dense", help="memory layout of q, k, v")
    group.addoption("--keep-freed-memory", action="store_true", help="malloc as in `fastib train`; a file of its own")
    group.addoption("--bench-results", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")


def pytest_collect_file(file_path, parent):
    # pytest itself takes the files that python_files matches or that the command line names.
    known = any(file_path.match(pattern) for pattern in parent.config.getini("python_files"))
    if file_path.match("bench_*.py") and not known and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_configure(config):
    # float32 means float32, for every peer
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    kept = config.getoption("--keep-freed-memory")
    if kept and not keep_freed_memory():
        raise pytest.UsageError("--keep-freed-memory: needs glibc, and no setting of malloc in the environment")
    config.fastib_house = House(
        Options(
            seconds=config.getoption("--bench-seconds"),
            budget=config.getoption("--bench-budget"),
            quick=config.getoption("--quick"),
            backend=config.getoption("--bench-backend"),
            results=config.getoption("--bench-results"),
            suffix="-freed-memory-kept" if kept else "",
        )
    )


def pytest_generate_tests(metafunc):
    """One test for each peer of each job that a module's jobs(device, config) names."""
    if "run_peer" not in metafunc.fixturenames:
        return
    device = metafunc.config.getoption("--bench-device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    peers = [(job, peer.name) for job in metafunc.module.jobs(device, metafunc.config) for peer in job.peers]
    names = [f"{job.key}-{peer.replace(' ', '_')}" for job, peer in peers]
    metafunc.parametrize(("job", "peer"), peers, ids=names)


def pytest_collection_modifyitems(config, items):
    """Where time is short: the first job of every file, then the second of every file."""
    if config.getoption("--bench-budget") is None:
        return
    ranks: dict[object, dict[int, int]] = {}

    def rank(item) -> int:
        job = getattr(item, "callspec", None) and item.callspec.params.get("job")
        jobs = ranks.setdefault(item.module, {})
        return jobs.setdefault(id(job), len(jobs)) if job else 0

    items.sort(key=rank)


@pytest.fixture
def house(request) -> House:
    return request.config.fastib_house


@pytest.fixture
def run_peer(request, house, benchmark):
    """run_peer(job, peer): measures the job once with all its selected peers, then shows this peer's part."""

    def run(job, peer):
        wanted = [
            item.callspec.params["peer"]
            for item in request.session.items
            if hasattr(item, "callspec") and item.callspec.params.get("job") is job
        ]
        try:
            house.measure(job, wanted)
        except Unavailable as reason:
            pytest.skip(str(reason))
        seen = house.replay(benchmark, job, peer)
        if seen.status == "ok":
            return
        if peer == job.peers[0].name:  # ours
            pytest.fail(f"{peer} is {seen.status}: {seen.reason}")
        pytest.skip(f"{peer} is {seen.status}: {seen.reason}")

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    for path in sorted(config.fastib_house.written):
        terminalreporter.section(str(path))
        terminalreporter.write_line(publish(path))
