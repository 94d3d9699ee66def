"""Freed memory stays with a process that asks for it."""

import os
import subprocess
import sys

import pytest

from fastib.train.host_memory import _glibc

STEPS = """
import resource, sys
import torch
from fastib.train.host_memory import keep_freed_memory

kept = len(sys.argv) > 1 and keep_freed_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(n << 18) for n in (3, 20, 9, 28)]  # MiB
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), min(faults), max(faults))
"""


def run(*args, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS, *args]
    output = subprocess.run(command, env=clean | environ, capture_output=True, text=True, check=True).stdout
    return [int(word) for word in output.split()]


@pytest.mark.skipif(not _glibc(), reason="malloc is not glibc's")
def test_a_step_takes_no_pages_from_the_system():
    kept, least, most = run("keep")
    assert kept == 1 and least < most / 20  # most: the first step's, which takes all of them
    assert run()[0] == 0


@pytest.mark.skipif(not _glibc(), reason="malloc is not glibc's")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_goes_first(name):
    value = {"MALLOC_ARENA_MAX": "4", "GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}[name]
    assert run("keep", **{name: value})[0] == 0
