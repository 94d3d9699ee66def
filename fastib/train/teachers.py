"""Teachers that belong to a run: which of them its method names, and the configurations they are trained with."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from fastib.train.config import TrainConfig, load_config
from fastib.train.errors import ConfigError
from fastib.train.runs import STUDENT

PREFIX = "own:"


def uses_own_teachers(config: TrainConfig) -> bool:
    """Whether an option of the method says ``own:NAME``."""
    return bool(_named(config))


def own_teachers(config: TrainConfig, folder: Path) -> list[TrainConfig]:
    """Configurations of the teachers that are still to be trained; in `config`, ``own:NAME`` becomes ``run:PATH``.

    Args:
        config: of the student. Its data (but batch size and augmentation), seed and device are the teachers' too.
        folder: of the student's run; the teachers' are below ``teachers/``.

    Raises:
        ConfigError: a name that ``config.teachers`` does not have, or a teacher without a usable recipe.
    """
    paths = {name: folder / "teachers" / name for name in _named(config)}
    missing = [_teacher(config, name, path) for name, path in paths.items() if not (path / STUDENT).is_file()]
    sources = {PREFIX + name: f"run:{path}" for name, path in paths.items()}
    for option in fields(config.method):
        value = getattr(config.method, option.name)
        if isinstance(value, list):
            setattr(config.method, option.name, [_replace(item, sources) for item in value])
        else:
            setattr(config.method, option.name, _replace(value, sources))
    return missing


def _replace(value, sources: dict[str, str]):
    return sources.get(value, value) if isinstance(value, str) else value


def _named(config: TrainConfig) -> list[str]:
    values = [getattr(config.method, option.name) for option in fields(config.method)]
    words = [word for value in values for word in (value if isinstance(value, list) else [value])]
    names = [word.removeprefix(PREFIX) for word in words if isinstance(word, str) and word.startswith(PREFIX)]
    return list(dict.fromkeys(names))


def _teacher(config: TrainConfig, name: str, path: Path) -> TrainConfig:
    if name not in config.teachers:
        known = ", ".join(config.teachers) or "none"
        raise ConfigError(f"there is no teacher {name!r} to train for {PREFIX}{name}; teachers: {known}")
    source = config.teachers[name]
    method, _, recipe = source.recipe.rpartition("/")
    if source.recipe.endswith((".yaml", ".yml")):
        method, recipe = "teacher", source.recipe
    if not method:
        raise ConfigError(f"teachers.{name}.recipe: expected METHOD/NAME or a YAML file, got {source.recipe!r}")
    teacher = load_config(method, recipe, overrides=source.options)
    teacher.data = replace(config.data, batch_size=teacher.data.batch_size, augment=teacher.data.augment)
    teacher.seed, teacher.device, teacher.deterministic = config.seed, config.device, config.deterministic
    teacher.output = str(path)
    return teacher
