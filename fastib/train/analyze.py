"""What a method reads off a finished run: ``fastib analyze``."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fastib.methods import get_method
from fastib.methods.base import Analysis
from fastib.train.build import build_model, describe, load_weights
from fastib.train.checkpoint import Checkpoints, read_tensors
from fastib.train.config import TrainConfig, read_config
from fastib.train.data import build_data
from fastib.train.errors import CheckpointError, ConfigError
from fastib.train.runs import CONFIG
from fastib.train.sampling import Stream


def _student(config: TrainConfig, tensors: dict[str, Tensor]) -> nn.Module:
    build_data(config.data)  # fills what the data set says of itself
    model = build_model(**describe(config.model, config.data))
    prefix = "student."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    load_weights(model, weights, Path("the checkpoint"))
    return model.eval()


def _images(config: TrainConfig, tensors: dict[str, Tensor]) -> Callable[[int], tuple[Tensor, Tensor]]:
    def pick(count: int) -> tuple[Tensor, Tensor]:
        """Evenly spaced evaluation images (count, C, H, W): as the student sees them, and as pictures in [0, 1]."""
        dataset = build_data(config.data).eval
        if isinstance(dataset, Stream):
            inputs = torch.stack([image for image, _ in itertools.islice(dataset, count)])
        else:
            places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
            inputs = torch.stack([dataset[0, place, place][0] for place in places])
        mean, std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (config.data.mean, config.data.std))
        return inputs, inputs * std + mean

    return pick


PROVIDED: dict[str, Callable] = {"student": _student, "images": _images}
"""Arguments that an analysis gets where its signature names them."""


def analyze_run(name: str, folder: Path, overrides: Sequence[str] = ()) -> Analysis:
    """Call the analysis `name` of the run's method on the weights of its newest checkpoint.

    Args:
        name: a key of `Method.analyses`.
        folder: of the run; files go to ``analysis/`` below it.
        overrides: ``key=value`` for the analysis.

    Raises:
        ConfigError: an analysis or a key that the method does not have, or a value it does not take.
        CheckpointError: the run has no checkpoint.
    """
    config = read_config(folder / CONFIG)
    method = config.method.name
    known = get_method(method).analyses
    if name not in known:
        raise ConfigError(f"method {method!r} has no analysis {name!r}; it has: {', '.join(known) or 'none'}")
    keys = list(inspect.signature(known[name]).parameters)[2:]
    options = _options(name, [key for key in keys if key not in PROVIDED], overrides)
    checkpoints = Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint to analyze")
    tensors, _ = read_tensors(checkpoints.path(steps[-1]) / "model.safetensors")
    target = folder / "analysis"
    target.mkdir(exist_ok=True)
    given = {key: PROVIDED[key](config, tensors) for key in keys if key in PROVIDED}
    try:
        return known[name](tensors, target, **options, **given)
    except ValueError as error:
        raise ConfigError(f"analysis {name}: {error}") from error


def _options(name: str, keys: list[str], overrides: Sequence[str]) -> dict:
    try:
        options = dict(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:
        raise ConfigError(f"cannot read {' '.join(overrides)}: expected key=value ({error})") from error
    for key in options:
        if key not in keys:
            raise ConfigError(f"analysis {name}: unknown key {key}; known keys: {', '.join(keys) or 'none'}")
    return options
