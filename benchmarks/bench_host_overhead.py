"""What a call costs the host: forward and backward on tensors so small that no kernel has anything to do."""

from __future__ import annotations

import time
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import Peer, Step, Unavailable
from benchmarks.house import Goal, Job
from benchmarks.peers.mhca_attention import Case, Inputs, allowed, fastib_step, reference
from benchmarks.replay import REPLAY

CALLS = 200
HOST_GOAL_US = 30.0


def per_call(device: str):
    """A timer: milliseconds of one of many calls, the device not waited for.

    On the CPU it counts this thread's own processor time, which a busy neighbour does not stretch.
    """
    cuda = device == "cuda"
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if cuda else (lambda: None, time.thread_time)
    calls = CALLS // 4 if cuda else CALLS

    def timer(step: Step) -> float:
        wait()
        start = clock()
        for _ in range(calls):
            step(False)
        spent = clock() - start
        wait()
        return spent * 1e3 / calls

    return timer


def native_step(inputs: Inputs) -> Step:
    """Both native operators called directly: what is left without argument checks and autograd."""
    import_module("fastib.ops")  # registers the operators
    if inputs.case.device == "cpu":
        from fastib._native import lib_available, why_not

        if not lib_available():
            raise Unavailable(why_not())
    leaves = [leaf.detach() for leaf in inputs.leaves]
    rest = (None, inputs.case.grid, inputs.case.grid, 1, inputs.case.D**-0.5, 0.0, 0.0)
    namespace = torch.ops.fastib

    def step(checking: bool):
        out, stats = namespace.mhca_attention(*leaves, *rest)
        return (out, *namespace.mhca_attention_backward(inputs.grad_out, *leaves, out, stats, *rest))

    return step


def sdpa_step(inputs: Inputs, masked: bool) -> Step:
    """Eager scaled_dot_product_attention, with a ready-made constant mask or without."""
    leaves = inputs.leaves[:3]
    mask = torch.zeros(1, inputs.case.H, inputs.case.N, inputs.case.N, device=inputs.case.device) if masked else None

    def step(checking: bool):
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))

    return step


class _Nothing(torch.autograd.Function):
    gradients: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def forward(ctx, *leaves):
        return leaves[0].view_as(leaves[0])

    @staticmethod
    def backward(ctx, grad_out):
        return _Nothing.gradients


def empty_step(inputs: Inputs) -> Step:
    """An autograd.Function of the same leaves that computes nothing: what Python's autograd costs by itself."""
    _Nothing.gradients = tuple(leaf.detach().clone() for leaf in inputs.leaves)

    def step(checking: bool):
        out = _Nothing.apply(*inputs.leaves)
        return (out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out))

    return step


def make_job(device: str, backend: str | None) -> Job:
    case = Case(1, 1, 1, 8, "float32", "train", device=device)
    inputs = Inputs(case)
    return Job(
        key=f"{device}-host",
        op="mhca_attention",
        mode="host",
        device=device,
        describe={
            "shape": {"B": case.B, "H": case.H, "N": case.N, "D": case.D},
            "dtype": case.dtype,
            "backend": backend or "auto",
        },
        peers=[
            Peer("fastib", lambda: fastib_step(inputs, backend)),
            Peer("fastib operators alone", lambda: native_step(inputs), note="no checks, no autograd"),
            Peer("empty function", lambda: empty_step(inputs), gated=False, note="the same leaves, nothing computed"),
            Peer("sdpa no bias", lambda: sdpa_step(inputs, False), gated=False, note="gradients to q, k, v"),
            Peer("sdpa constant mask", lambda: sdpa_step(inputs, True), gated=False, note="gradients to q, k, v"),
        ],
        reference=lambda: reference(inputs),
        allowed=allowed(case.dtype),
        goals=(Goal(HOST_GOAL_US * 1e-3, ()),),
        seconds=3.0,
        min_rounds=9,
        memory=False,
        timer=per_call(device),
        release=inputs.release,
    )


def jobs(device: str, config) -> list[Job]:
    return [make_job(device, config.getoption("--bench-backend"))]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_host_overhead(job, peer, run_peer):
    run_peer(job, peer)
