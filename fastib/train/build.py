"""Students from the configuration, their weights as self-describing files, and teachers from either."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import fastib.models  # noqa: F401 (registers its models with timm)
from fastib.train.checkpoint import beside, read_tensors, write_tensors
from fastib.train.config import DataConfig, ModelConfig
from fastib.train.errors import CheckpointError, ConfigError
from fastib.train.runs import STUDENT


def describe(model: ModelConfig, data: DataConfig) -> dict:
    """What build_model needs to know; `data` must be resolved by build_data."""
    return {"name": model.name, "kwargs": model.kwargs, "num_classes": data.num_classes, "in_chans": data.in_chans,
            "img_size": data.img_size}  # fmt: skip


def build_model(name: str, kwargs: dict, num_classes: int, in_chans: int, img_size: int, pretrained: bool = False):
    """A model of timm's registry. ``img_size`` is passed on where the model's default_cfg has ``fixed_input_size``.

    Raises ConfigError for an unknown name and for arguments that the model does not take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options = ({"img_size": img_size} if fixed else {}) | kwargs
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)
    except Exception as error:
        raise ConfigError(f"cannot build the model {name} with {options}: {error}") from error


@torch.no_grad()
def try_out(model: nn.Module, data: DataConfig, name: str) -> nn.Module:
    """`model` after one empty image in eval mode. Raises ConfigError, naming it `name`, where it does not take it."""
    shape, training = (data.in_chans, data.img_size, data.img_size), model.training
    try:
        model.eval()(torch.zeros(1, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{name} does not take images of {' x '.join(map(str, shape))}: {error}") from error
    return model.train(training)


def save_student(path: Path, weights: dict[str, Tensor], description: dict) -> None:
    """Write a student's weights together with the description of the model they belong to."""
    temporary = beside(path)
    write_tensors(temporary, weights, {"fastib": json.dumps(description)})
    temporary.replace(path)


def load_student(path: Path) -> nn.Module:
    """The model of a file by `save_student`. Raises CheckpointError naming the file."""
    tensors, metadata = read_tensors(path)
    if "fastib" not in metadata:
        raise CheckpointError(f"{path} does not say which model it holds; give timm:NAME@{path} instead")
    model = build_model(**json.loads(metadata["fastib"]))
    load_weights(model, tensors, path)
    return model


def load_weights(model: nn.Module, tensors: dict, path: Path) -> None:
    """Strict load. Raises CheckpointError naming the file and the first keys that do not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {lines[:400]}") from error


def load_teacher(source: str) -> nn.Module:
    """A frozen model in eval mode.

    Args:
        source: ``run:FOLDER`` (a finished run), ``timm:NAME`` (timm's pretrained weights), ``timm:NAME@FILE`` (weights
            in a local safetensors file), or the path of a safetensors file that fastib wrote.

    Raises:
        CheckpointError: the weights are missing, unreadable, pickled, or cannot be fetched.
    """
    kind, _, rest = source.partition(":")
    if kind == "run" and rest:
        path = Path(rest) / STUDENT
        if not path.is_file():
            raise CheckpointError(f"teacher {source}: there is no {path}; has the run finished?")
        model = load_student(path)
    elif kind == "timm" and rest:
        model = _timm_teacher(*rest.partition("@")[::2])
    else:
        model = load_student(_weights_file(source))
    return model.eval().requires_grad_(False)


def _timm_teacher(name: str, file: str) -> nn.Module:
    overlay = {"file": str(_weights_file(file))} if file else None
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"cannot get the weights of timm:{name}: {reason}. Without a network, give "
            f"timm:{name}@FILE.safetensors, or run:FOLDER of a teacher trained with `fastib teacher`"
        ) from error


def _weights_file(source: str) -> Path:
    path = Path(source)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"teacher {source!r}: expected run:FOLDER, timm:NAME or a .safetensors file; "
            "files that hold pickled code (.pt, .pth, .bin, .ckpt) are never loaded"
        )
    if not path.is_file():
        raise CheckpointError(f"teacher {source!r}: there is no such file")
    return path
