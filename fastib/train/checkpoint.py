"""Checkpoints: folders of safetensors and JSON, written whole or not at all. Nothing is ever pickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastib.train.errors import CheckpointError

FORMAT, VERSION = "fastib-checkpoint", 1
STATE = "state.json"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on the disk. Tensors that share memory are written separately.

    Raises CheckpointError naming the file, which is then not there.
    """
    seen: set[int] = set()
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    try:
        save_file(whole, path, metadata={"format": "pt"} | (metadata or {}))
        _sync(path)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises CheckpointError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error} (truncated, or no safetensors file)") from error


def beside(path: Path) -> Path:
    """A place to write what will be renamed to `path`, which no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = beside(path)
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split ``optimizer.state_dict()`` into tensors named ``parameter/name`` and what JSON can hold."""
    groups = {f"group-{i}": group for i, group in enumerate(state["param_groups"])}
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for owner, values in {**state["state"], **groups}.items():
        rest[str(owner)] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors |= {f"{owner}/{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, rest


def unflatten_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`; parameters that are numbers get their numbers back."""
    owners = {owner: dict(values) for owner, values in rest.items()}
    for key, value in tensors.items():
        owner, _, name = key.rpartition("/")
        owners[owner][name] = value
    groups = [owners.pop(f"group-{i}") for i in range(sum(owner.startswith("group-") for owner in owners))]
    state = {int(owner) if owner.isdigit() else owner: values for owner, values in owners.items()}
    return {"state": state, "param_groups": groups}


class Checkpoints:
    """The checkpoints of a run, one folder ``step-NNNNNNNN`` each.

    Args:
        folder: where they lie.
        keep: how many of the newest stay; the one of the best evaluation stays too.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], best: int | None) -> Path:
        """Write one checkpoint, then drop the old ones, and any of a later step (of an abandoned continuation).

        Args:
            tensors: per file stem, the named tensors.
            state: anything JSON can hold.
            best: step of the best evaluation so far.
        """
        target = self.path(step)
        temporary = self.folder / ".tmp"  # of one that was broken off, too
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        header = {"format": FORMAT, "version": VERSION, "torch": torch.__version__, "files": sorted(tensors)}
        try:
            for stem, values in tensors.items():
                write_tensors(temporary / f"{stem}.safetensors", values)
            write_text(temporary / STATE, json.dumps(header | {"step": step} | state))
        except (CheckpointError, OSError):
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
        _sync(self.folder)
        newest = [other for other in self.steps() if other <= step][-self.keep :]
        for other in self.steps():
            if other not in (*newest, best):
                shutil.rmtree(self.path(other), ignore_errors=True)
        return target

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors per file, and the state. Raises CheckpointError naming the file that is at fault."""
        file = self.path(step) / STATE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
        if (
            not isinstance(state, dict)
            or state.get("format") != FORMAT
            or not {"version", "step", "files"} <= set(state)
        ):
            raise CheckpointError(f"{file} is not the state of a fastib checkpoint")
        if state["version"] != VERSION:
            raise CheckpointError(f"{file} has version {state['version']}; this fastib reads version {VERSION}")
        if state["step"] != step:
            raise CheckpointError(f"{file} is of step {state['step']}, not of step {step}")
        return {stem: read_tensors(self.path(step) / f"{stem}.safetensors")[0] for stem in state["files"]}, state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
