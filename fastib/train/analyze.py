"""What a method reads off a finished run: ``fastib analyze``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fastib.methods import get_method
from fastib.methods.base import Analysis
from fastib.train.checkpoint import Checkpoints, read_tensors
from fastib.train.config import read_config
from fastib.train.errors import CheckpointError, ConfigError
from fastib.train.runs import CONFIG


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
    method = read_config(folder / CONFIG).method.name
    known = get_method(method).analyses
    if name not in known:
        raise ConfigError(f"method {method!r} has no analysis {name!r}; it has: {', '.join(known) or 'none'}")
    options = _options(name, list(inspect.signature(known[name]).parameters)[2:], overrides)
    checkpoints = Checkpoints(folder / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint to analyze")
    tensors, _ = read_tensors(checkpoints.path(steps[-1]) / "model.safetensors")
    target = folder / "analysis"
    target.mkdir(exist_ok=True)
    try:
        return known[name](tensors, target, **options)
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
