"""Fixtures of every operator's tests: where its kernels run, and memory that is poisoned before they do."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from helpers import Target, kernel_targets

# The same examples in every run; `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        gpu = getattr(metafunc.module, "GPU", "triton")  # the operator's GPU implementation
        metafunc.parametrize("target", kernel_targets(gpu), ids=str, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs on a GPU alone, so that `-m gpu` selects it."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "cuda" in [getattr(params.get(name), "device", params.get(name)) for name in ("target", "where", "device")]:
            item.add_marker(pytest.mark.gpu)


GPU_FAULT = re.compile("illegal memory access|misaligned address|unspecified launch failure|illegal instruction")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends a pytest-xdist worker whose GPU has faulted: every later call of its process would fail, a new one's not."""
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed and GPU_FAULT.search(report.longreprtext):
        os._exit(1)


@pytest.fixture
def target(request: pytest.FixtureRequest):
    """One place where kernels run, instruction set or GPU, forced for the test; skips, saying why, where it cannot."""
    target: Target = request.param
    reason = target.why_not()
    if target.device == "cuda" and request.node.callspec.params.get("dtype") == torch.float64:
        reason = "float64 on the GPU is the reference"
    if reason:
        pytest.skip(reason)
    with target.forced():
        yield target


@pytest.fixture
def poisoned_memory():
    """Every tensor that torch allocates uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restored_threads():
    """Puts torch's number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
