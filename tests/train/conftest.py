"""A run small enough for tests: a one-block ViT on a fifth of the digits, four steps an epoch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastib.train.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.name=vit_tiny_patch16_224",
    "model.kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
    "data.train_fraction=0.2",
    "data.img_size=16",
    "data.batch_size=64",
    "epochs=3",
    "optim.lr=0.004",
    "sched.warmup_epochs=0",
    "device=cpu",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit comparisons between processes need the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path):
    """``tiny("epochs=1", output="name")``: the configuration of a small run below tmp_path."""

    def make(*overrides: str, method: str = "plain", output: str = "run"):
        empty = tmp_path / "empty.yaml"
        empty.write_text("{}")
        return load_config(method, recipe=str(empty), overrides=[*TINY, *overrides, f"output={tmp_path / output}"])

    return make


@pytest.fixture
def scenario(tmp_path):
    """Run a function of scenarios.py in a fresh process, or in several under torchrun."""

    def run(name: str, *arguments: str, processes: int = 1, timeout: int = 240) -> subprocess.CompletedProcess:
        script = [str(Path(__file__).with_name("scenarios.py")), name, *map(str, arguments)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), *script],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True, text=True, timeout=timeout, cwd=tmp_path, check=False,
        )  # fmt: skip

    return run


def spy_gradients(trainer) -> dict[str, torch.Tensor]:
    """A dict that fills with the gradients of the first optimizer step."""
    found: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def spy(*args, **kwargs):
        if trainer.accelerator.sync_gradients and not found:
            found.update({name: p.grad.clone() for name, p in trainer.method.named_parameters()})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    return found


@pytest.fixture
def first_gradients():
    """`spy_gradients` for tests, which cannot import this file."""
    return spy_gradients


def frozen(trainer) -> None:
    """BatchNorm keeps its running statistics, and sees no batch: processes with a part of it each compute the same."""
    for module in trainer.method.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True, module=module: module


@pytest.fixture
def freeze_norms():
    """`frozen` for tests, which cannot import this file."""
    return frozen
