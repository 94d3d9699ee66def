"""What the tests themselves rely on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import expanded, on_device, sliced, transposed_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("view", [sliced, transposed_rows, expanded, lambda t: t[:, 1:, ::2]])
def test_a_view_stays_what_it_is_on_another_device(view):
    t = view(torch.arange(60.0).reshape(3, 4, 5))
    there = on_device(t, "meta")
    assert there.device.type == "meta" and there.dtype == t.dtype and there.shape == t.shape
    assert there.stride() == t.stride() and there.storage_offset() == t.storage_offset()
    assert there.untyped_storage().nbytes() == t.untyped_storage().nbytes()
    assert on_device(t, "cpu") is t


@pytest.mark.slow
def test_the_gpu_marker_selects_all_that_needs_one():
    """`-m gpu` finds every test that skips where there is no GPU, in whatever way it does."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--collect-only", "-p", "no:cacheprovider", "-m"]
    chosen, others = (
        subprocess.run([*command, marker], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        for marker in ("gpu", "not gpu")
    )
    for name in (
        "test_mhca_attention.py::test_any_head_dim[triton-",
        "test_mhca_attention.py::test_any_shape_layout_and_dtype_on_a_gpu[triton]",
        "test_mhca_attention_cuda.py::test_cuda_graph_replays_new_masks",
        "test_mhca_attention_torch.py::test_opcheck[cuda-",
        "test_mhca_attention_triton.py::test_gpu_masks[",
        "test_involution.py::test_any_shape_layout_and_dtype[cuda]",
        "test_involution_cuda.py::TestOnGpu::test_memory",
        "test_philox.py::test_same_words_on_cuda",
    ):
        assert any(f"tests/{name}" in line for line in chosen), name
    assert [line for line in others if re.search(r"\[(triton|cuda)\b|::TestOnGpu|::test_gpu|_gpu\b", line)] == []


def test_a_fault_of_the_gpu_fails_one_test(tmp_path):
    """The worker it happens in is replaced by one that goes on."""
    pytest.importorskip("xdist")
    code = """
def test_before(): pass
def test_fault(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
"""
    (tmp_path / "test_three.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "conftest", "-c", os.devnull, "test_three.py"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker
    alone["PYTHONPATH"] = str(ROOT / "tests")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=alone)
    for expected in ("2 passed", "an illegal memory access", "worker 'gw0' crashed"):
        assert expected in done.stdout, done.stdout
