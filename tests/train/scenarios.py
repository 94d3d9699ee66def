"""Runs that must live in a process of their own: those that are killed, and those of several processes."""

import os
import signal
import sys
from pathlib import Path

import torch
from conftest import frozen, spy_gradients
from safetensors.torch import save_file

from fastib.train import checkpoint
from fastib.train.cli import main
from fastib.train.config import read_config
from fastib.train.loop import Trainer, resume, train
from fastib.train.processes import leave_process_group


def kill_in_step(config: str, step: str) -> None:
    """SIGKILL in the middle of the step after `step` completed ones."""
    _during_step(int(step), signal.SIGKILL)
    train(read_config(config))


def whole(config: str) -> None:
    """A run from beginning to end, by the command line."""
    assert main(["train", read_config(config).method.name, "--recipe", config]) == 0


def terminate_in_step(config: str, step: str) -> None:
    """SIGTERM in the middle of a step, as a scheduler sends it."""
    _during_step(int(step), signal.SIGTERM)
    sys.exit(main(["train", "plain", "--recipe", config]))


def kill_in_checkpoint(config: str, count: str) -> None:
    """SIGKILL when half of the tensor file number `count` has been written."""
    original, left = checkpoint.write_tensors, [int(count)]

    def write(path, tensors, metadata=None):
        original(path, tensors, metadata)
        left[0] -= 1
        if left[0] == 0:
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_tensors = write
    train(read_config(config))


def gradients(config: str, target: str) -> None:
    """Write the gradients of the first step, and the trained weights, from process 0."""
    trainer = Trainer(read_config(config))
    save = spy_gradients(trainer)
    trainer.fit()
    if trainer.rank == 0:
        save_file(save, target)


def frozen_norms(config: str, target: str) -> None:
    """`gradients` with `frozen` norms."""
    trainer = Trainer(read_config(config))
    frozen(trainer)
    save = spy_gradients(trainer)
    trainer.fit()
    if trainer.rank == 0:
        save_file(save, target)


def sharded(config: str) -> None:
    """FSDP2 on the CPU, which accelerate offers on accelerators alone: its state is changed behind its back."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )  # fmt: skip
    init = AcceleratorState.__init__

    def sharded_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded_init
    run = read_config(config)
    if Path(run.output).exists():
        resume(run.output)
    else:
        train(run)
    leave_process_group()
    sys.stdout.flush()
    os._exit(0)  # DTensor's caches keep the mesh, and so the threads of gloo, which FSDP does not use elsewhere


def _during_step(step: int, signum: int) -> None:
    original = Trainer._train_step

    def train_step(self, batches):
        if self.step == step:
            os.kill(os.getpid(), signum)
        return original(self, batches)

    Trainer._train_step = train_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    leave_process_group()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), f"threads that may abort the end of Python: {threads}"
