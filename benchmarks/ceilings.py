"""What this machine can do at best: register-only arithmetic, matrix products, memory copies."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import Unavailable, one_line

SOURCE = Path(__file__).with_name("fma_peak.c")


def build_peak_library() -> ctypes.CDLL:
    """Compiles `fma_peak.c` for this very processor; Unavailable where there is no compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise Unavailable("no C compiler to build the register-only loop with")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", library, SOURCE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{compiler} could not build fma_peak.c: {one_line(Exception(done.stderr))}")
        loaded = ctypes.CDLL(str(library))
    for function in (loaded.fma_float32, loaded.dot_bfloat16):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    return loaded


def cpu_loop_gflops(name: str, seconds: float = 0.5) -> float:
    """GFLOP/s of a register-only loop on as many threads as torch uses: the best of many short runs.

    ctypes lets go of the interpreter lock, so Python's threads do.
    """
    loop = getattr(build_peak_library(), name)
    flops = loop(1)
    if not flops:
        raise Unavailable("this processor has no such instruction")
    threads, best = torch.get_num_threads(), 0.0
    with ThreadPoolExecutor(threads) as pool:
        # Long runs outlast the start of the threads, short ones fit between two interruptions: the best of both counts.
        for work in (1e8, 1e9):
            iterations = int(work / flops)
            end = time.perf_counter() + seconds / 2
            while time.perf_counter() < end:
                start = time.perf_counter()
                list(pool.map(loop, [iterations] * threads))
                best = max(best, threads * iterations * flops / (time.perf_counter() - start) * 1e-9)
    return best


def device_seconds(step: Callable[[], object], device: str, seconds: float = 0.5) -> float:
    """Median seconds of a step, the device waited for, over about `seconds`; one call where a call alone takes that."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 50):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def gemm_gflops(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of torch.mm, the best of a few square sizes, random data; larger sizes only while they take a moment."""
    best = 0.0
    for size in (2048, 4096, 8192) if device == "cuda" else (256, 512, 1024, 1536):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = device_seconds(lambda a=a, b=b: a @ b, device)
        best = max(best, 2 * size**3 / seconds * 1e-9)
        if seconds > 0.2:
            break
    return best


def copy_gbps(device: str) -> float:
    """GB/s of a copy far larger than the caches, bytes read plus bytes written."""
    size = 2**30 if device == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source).zero_()
    return 2 * size / device_seconds(lambda: target.copy_(source), device) * 1e-9


def cuda_fma_gflops() -> float:
    """GFLOP/s of a register-only float32 loop on the GPU."""
    from benchmarks.fma_peak_triton import run

    rounds = 4096
    flops, launch = run(rounds)
    return flops / device_seconds(launch, "cuda") * 1e-9


def measure_ceilings(device: str) -> dict[str, float | str]:
    """Name -> GFLOP/s (GB/s for `copy`), or the reason why it could not be measured."""
    probes: dict[str, Callable[[], float]] = {
        "gemm_float32": lambda: gemm_gflops(torch.float32, device),
        "gemm_bfloat16": lambda: gemm_gflops(torch.bfloat16, device),
        "copy": lambda: copy_gbps(device),
    }
    if device == "cuda":
        probes["fma_float32"] = cuda_fma_gflops
    else:
        probes["fma_float32"] = lambda: cpu_loop_gflops("fma_float32")
        probes["dot_bfloat16"] = lambda: cpu_loop_gflops("dot_bfloat16")
    found: dict[str, float | str] = {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:
            # A ceiling that cannot be measured is shown with the reason; the benchmarks run without it.
            found[name] = one_line(error)
    return found


def shares(gflops: float, gbps: float, dtype: str, ceilings: dict[str, float | str]) -> dict[str, float]:
    """Fractions of each ceiling that applies to the element type: of the loop, of the matrix product, of the copy."""
    numbers = {name: value for name, value in ceilings.items() if not isinstance(value, str)}
    loop = "dot_bfloat16" if dtype == "bfloat16" and "dot_bfloat16" in numbers else "fma_float32"
    wanted = {loop: gflops, f"gemm_{dtype}": gflops, "copy": gbps}
    return {name: rate / numbers[name] for name, rate in wanted.items() if name in numbers}
