"""A register-only float32 loop for the GPU, the counterpart of `fma_peak.c`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 4


@triton.jit
def fma_peak_kernel(out_ptr, rounds, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) * 1e-6
    for _ in range(rounds):
        x = x * 0.999 + 0.001
        x = x * 0.998 + 0.002
        x = x * 0.997 + 0.003
        x = x * 0.996 + 0.004
    # One number per program leaves the chip, so that nothing above can be dropped.
    tl.store(out_ptr + tl.program_id(0), tl.sum(x))


def run(rounds: int) -> tuple[float, Callable[[], object]]:
    """Operations of one launch, and the launch."""
    programs = 16 * torch.cuda.get_device_properties("cuda").multi_processor_count
    out = torch.empty(programs, device="cuda")
    flops = 2.0 * 4 * rounds * BLOCK * programs
    return flops, lambda: fma_peak_kernel[(programs,)](out, rounds, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
