"""CUDA kernels without a GPU: their bodies compiled for the host, and what nvcc makes of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90, 100, 120)
KERNEL = r"Compiling entry function '(\S+)' for 'sm_\w+'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores"


def host_function(name: str, folder: Path):
    """The C function `name` of tests/cpp/<name>.cpp, compiled into `folder`."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / f"{name}.so"
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", str(ROOT / f"tests/cpp/{name}.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return getattr(ctypes.CDLL(str(library)), name)


def compiled_kernels(source: str, arch: int, folder: Path) -> list[str]:
    """The kernels that nvcc makes of kernels/cuda/<source> for sm_<arch>, of which none may spill registers or keep an
    array in memory."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{arch}\n" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
    command += [str(ROOT / "kernels/cuda" / source), "-o", str(folder / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = re.findall(KERNEL, done.stderr)
    assert [kernel for kernel in kernels if kernel[1:] != ("0", "0")] == []
    return [name for name, *_ in kernels]
