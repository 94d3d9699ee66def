"""Model and optimizer state to plain tensors and back, whether sharded (FSDP2), wrapped (DDP) or neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastib.train.checkpoint import flatten_optimizer, unflatten_optimizer
from fastib.train.errors import CheckpointError


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU, under the unwrapped module's names; only sure to be there on the main process.

    Every process must call this.
    """
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def gather_state(accelerator, model, optimizer) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors per file of a checkpoint, and the part that goes into JSON; empty but on the main process.

    Every process must call this.
    """
    weights = gather_weights(model)
    if accelerator.is_fsdp2:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optim = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
    else:
        optim = optimizer.state_dict()
    if not accelerator.is_main_process:
        return {}, {}
    tensors, rest = flatten_optimizer(optim)
    state = {"optimizer": rest, "sharded": accelerator.is_fsdp2}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    return {"model": weights, "optimizer": tensors}, state


def restore_state(accelerator, model, optimizer, tensors: dict, state: dict[str, Any], folder: Path) -> None:
    """The inverse of `gather_state`. Raises CheckpointError where `folder` holds another model's state."""
    try:
        if state["sharded"] != accelerator.is_fsdp2:
            kinds = "FSDP" if state["sharded"] else "no FSDP", "FSDP" if accelerator.is_fsdp2 else "no FSDP"
            raise ValueError(f"written with {kinds[0]}, read with {kinds[1]}")
        optim = unflatten_optimizer(tensors["optimizer"], state["optimizer"])
        set_model_state_dict(model, tensors["model"], options=StateDictOptions(full_state_dict=True))
        if accelerator.is_fsdp2:
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(model, optimizer.optimizer, optim, options=options)
        else:
            optimizer.load_state_dict(optim)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"the checkpoint {folder} does not belong to this run: {reason}") from error
