"""A training step of RedNet-26 at 224 pixels, against the same model with the reference of `involution`."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from functools import cached_property
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Peer, Step
from benchmarks.house import Goal, Job
from benchmarks.replay import REPLAY

OP = "rednet26"
# Twice what the float32 reference operator has, on a model whose ReLUs are smooth: through ReLUs a rounding opens and
# shuts gates, which moves the gradients of the reference, too, by 1e-2.
ALLOWED = {"logits": 2e-6, "first reduce": 4e-5, "first span": 4e-5, "last span": 4e-5}


@dataclass(frozen=True)
class Case:
    """One row of the table: images per batch, their side, options of the model."""

    batch: int
    side: int = 224
    device: str = "cpu"
    options: dict = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        return f"{self.device}-train-{OP}-B{self.batch}-{self.side}x{self.side}-float32"


@contextlib.contextmanager
def checkable():
    """Within it F.relu, which nn.ReLU calls too, is softplus."""
    with mock.patch.object(F, "relu", lambda x, inplace=False: F.softplus(x)):
        yield


class Inputs:
    """The model and the images of a case, made when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def made(self) -> tuple[nn.Module, Tensor]:
        import timm

        import fastib.models  # noqa: F401

        torch.manual_seed(7)
        model = timm.create_model("rednet26", **self.case.options).to(self.case.device)
        for stage in model.stages:
            for block in stage:
                nn.init.ones_(block.norm3.weight)  # else the branch is silent, and its gradients are zero
        return model, torch.randn(self.case.batch, 3, self.case.side, self.case.side, device=self.case.device)

    def step(self, backend: str | None, dtype: torch.dtype | None = None) -> Step:
        """Logits of a forward in training mode, and the gradients of their mean square; when checked, without kinks."""
        from fastib.nn import Involution2d

        def step(checking: bool) -> tuple[Tensor, ...]:
            model, images = self.made
            if dtype is not None:
                model, images = copy.deepcopy(model).to(dtype), images.to(dtype)
            layers = [layer for layer in model.modules() if isinstance(layer, Involution2d)]
            for layer in layers:
                layer.backend = backend
            with checkable() if checking else contextlib.nullcontext():
                logits = model(images)
                gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
            by_weight = {id(p): g for p, g in zip(model.parameters(), gradients, strict=True)}
            seen = (layers[0].reduce.weight, layers[0].span.weight, layers[-1].span.weight)
            return (logits.detach(), *(by_weight[id(weight)] for weight in seen))

        return step

    def release(self) -> None:
        """Drops the model; it is made again, the same, if it is asked for."""
        self.__dict__.pop("made", None)


def make_job(case: Case, backend: str | None = None) -> Job:
    """A case with its peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP,
        mode="train",
        device=case.device,
        describe={"shape": {"B": case.batch, "side": case.side}, "dtype": "float32"},
        peers=[
            Peer("fastib", lambda: inputs.step(backend)),
            Peer("reference operator", lambda: inputs.step("reference")),
        ],
        reference=lambda: inputs.step("reference", torch.float64)(True),
        allowed=ALLOWED,
        goals=(Goal(1 / 8, ("reference operator",)),) if case.device == "cpu" else (),
        release=inputs.release,
        seconds=30.0,
        min_rounds=5,
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker."""
    return make_job(Case(2, 32, device, {"layers": (1, 1), "widths": (16, 16), "num_classes": 3}))


def jobs(device: str, config) -> list[Job]:
    return [make_job(Case(64 if device == "cuda" else 2, device=device), config.getoption("--bench-backend"))]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_rednet(job, peer, run_peer):
    run_peer(job, peer)
