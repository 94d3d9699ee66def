"""A training step of Bootstrapping ViTs with shared weights: aligned gradients (Algorithm 1) against the plain sum."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Peer, Step
from benchmarks.house import Goal, Job
from benchmarks.replay import REPLAY

OP = "bootstrap"
MODELS = {
    "paper": (
        "bootstrap_vit_small_patch16_224",
        dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), 0.0),  # the gate compares steps
        [0, 1],
        100,
    ),
    "digits": (
        "vit_tiny_patch16_224",
        {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 72, "depth": 4, "num_heads": 9, "mlp_ratio": 2.0},
        [-1],
        10,
    ),
    "small": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 6},
        [0],
        3,
    ),
}
SEEN = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.1.attn.proj.weight")


@dataclass(frozen=True)
class Case:
    """One row of the table: which of MODELS, images per batch."""

    model: str
    batch: int
    device: str = "cpu"

    @property
    def key(self) -> str:
        return f"{self.device}-train-{OP}-{self.model}-B{self.batch}-float32"


class Inputs:
    """Networks and images of a case, made when first asked for; the same weights whatever `align` is."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def made(self) -> tuple:
        import timm
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        import fastib.models  # noqa: F401
        from fastib.methods import get_method

        name, kwargs, down_sample, classes = MODELS[self.case.model]
        torch.manual_seed(7)
        student = timm.create_model(name, num_classes=classes, **kwargs)
        cls = get_method("bootstrap")
        method = cls(cls.Options(shared=True, down_sample=down_sample), student, classes, lambda source: None)
        size = student.patch_embed.img_size
        images = torch.randn(self.case.batch, student.patch_embed.proj.in_channels, *size)
        targets = torch.arange(self.case.batch) % classes
        AcceleratorState._reset_state(reset_partial_state=True)
        machine = Accelerator(cpu=self.case.device == "cpu")
        return method.to(self.case.device).train(), images.to(self.case.device), targets.to(self.case.device), machine

    def step(self, align: str) -> Step:
        """Losses, backward pass and alignment: the gradients SEEN."""

        def step(checking: bool) -> tuple[Tensor, ...]:
            method, images, targets, machine = self.made
            method.options.align, method.aligns = align, align != "none"
            if align == "none":
                method.shared_weights.leaves.clear()
            method.zero_grad()
            method.backward(method(images, targets, 0.0), machine)
            return tuple(method.student.get_parameter(name).grad for name in SEEN)

        return step

    def reference(self) -> tuple[Tensor, ...]:
        """Algorithm 1 in float64, from one backward pass for each network."""
        method, images, targets, _ = self.made
        twin = copy.deepcopy(method).double()
        twin.aligns = False
        losses = twin(images.double(), targets, 0.0)
        weights = [twin.student.get_parameter(name) for name in SEEN]
        of_agent = {name: value for name, value in losses.items() if name.startswith("agent")}
        of_vit = {name: value for name, value in losses.items() if name not in of_agent}
        vit, agent = (
            torch.autograd.grad(sum(terms.values()), weights, retain_graph=True) for terms in (of_vit, of_agent)
        )
        results = []
        for name, v, a in zip(SEEN, vit, agent, strict=True):
            rows = slice(2 * len(v) // 3, None) if name.endswith("qkv.weight") else slice(None)
            result, v, a = v.clone(), v[rows], a[rows]
            inner = (v * a).sum()
            result[rows] = (v + (a - inner / v.square().sum() * v if inner < 0 else a)) / 2
            results.append(result)
        return tuple(results)

    def release(self) -> None:
        """Drops the networks; they are made again, the same, if they are asked for."""
        self.__dict__.pop("made", None)


def make_job(case: Case) -> Job:
    """A case with its peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP,
        mode="train",
        device=case.device,
        describe={"shape": {"model": case.model, "B": case.batch}, "dtype": "float32"},
        peers=[
            Peer("fastib", lambda: inputs.step("tensor")),
            Peer("aligned as one", lambda: inputs.step("all"), gated=False, note="all shared tensors as one vector"),
            Peer("plain sum", lambda: inputs.step("none"), gated=False, note="no alignment: the floor"),
        ],
        reference=inputs.reference,
        allowed=dict.fromkeys(SEEN, 2e-5 if case.device == "cpu" else 1e-3),  # a GPU may take Winograd's algorithm
        goals=(Goal(1.1, ("plain sum",)),),
        release=inputs.release,
        seconds=30.0,
        min_rounds=7,
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker."""
    return make_job(Case("small", 4, device))


def jobs(device: str, config) -> list[Job]:
    batches = {"paper": 64, "digits": 64} if device == "cuda" else {"paper": 4, "digits": 64}
    return [make_job(Case(model, batch, device)) for model, batch in batches.items()]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_bootstrap(job, peer, run_peer):
    run_peer(job, peer)
