"""The configuration of a run: dataclasses, filled from a YAML recipe and from ``key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastib.methods import MethodOptions, get_method, list_methods
from fastib.train.checkpoint import write_text
from fastib.train.errors import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass
class ModelConfig:
    """The student, by its name in timm's registry."""

    name: str = "vit_small_patch16_224"
    pretrained: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # for timm.create_model (patch_size, ...)


@dataclass
class AugmentConfig:
    """Training augmentation: timm's create_transform for images, timm's Mixup for both, and the digits' own."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    crop_padding: int | None = None  # for scale and ratio: crop the image's size of the padded image
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None  # for example rand-m9-mstd0.5-inc1
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"] = "bicubic"
    reprob: float = 0.0
    remode: Literal["const", "rand", "pixel"] = "pixel"
    recount: int = 1
    repeats: int = 1  # repeated augmentation: copies of an image among the samples of one epoch

    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = 0.0

    degrees: float = 10.0  # digits: rotation up to this many degrees either way
    translate: float = 0.125  # digits: shift up to this fraction of the image size either way
    zoom: float = 0.1  # digits: scale factor in [1 - zoom, 1 + zoom]


@dataclass
class DataConfig:
    """The images. ``batch_size`` counts images per optimizer step, over all processes and accumulated micro-batches."""

    name: str = "digits"  # digits, folder, cifar10, cifar100, or a name of timm's create_dataset (hfds/..., wds/...)
    path: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    eval_fraction: float = 0.2  # held out for evaluation where a folder has no such split
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_dataset
    download: bool = False
    train_fraction: float = 1.0  # stratified subset of the training images
    split_seed: int = 0
    img_size: int | None = None  # None: 8 for digits, 32 for CIFAR, 224 otherwise
    in_chans: int | None = None  # None: 1 for digits, 3 otherwise
    num_classes: int | None = None  # None: as the data set says
    classes: list[str] | None = None  # their names; None: as the data set says, and kept in the run's config.yaml
    mean: list[float] | None = None  # None: ImageNet's, or those of the digits
    std: list[float] | None = None
    batch_size: int = 128
    eval_batch_size: int = 256  # per process
    workers: int = 2  # loader processes; the digits need none
    crop_pct: float = 0.875
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class OptimConfig:
    """Fields of timm's create_optimizer_v2; ``lr`` is never rescaled by the batch size."""

    opt: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    filter_bias_and_bn: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)  # eps, betas, ...


@dataclass
class SchedConfig:
    """Fields of timm's create_scheduler_v2; epochs may be fractions, the rate changes at every step."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "cosine"
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: float = 5.0
    cooldown_epochs: float = 0.0  # the last epochs of the run, at min_lr
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    kwargs: dict[str, Any] = field(default_factory=dict)  # decay_milestones, k_decay, ...


@dataclass
class EmaConfig:
    """Moving average of the student's weights (timm's ModelEmaV3); decay 0 switches it off."""

    decay: float = 0.0
    warmup: bool = False


@dataclass
class CheckpointConfig:
    """When a checkpoint is written, beside those of the best evaluation, of the end and of a stopping signal."""

    every_epochs: int = 1  # 0: never
    every_steps: int = 0  # 0: never
    keep: int = 2  # the newest so many stay, and the best


@dataclass
class TeacherConfig:
    """A teacher that is trained before the student, on the same images, with the same seed and device."""

    recipe: str = ""  # METHOD/NAME of a recipe, or a YAML file
    options: list[str] = field(default_factory=list)  # key=value over the recipe


@dataclass
class TrainConfig:
    """A whole run. The recipe's YAML has these keys; ``method`` holds the options of the method that ``name`` names."""

    method: MethodOptions = field(default_factory=MethodOptions)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)  # those that `method` names as own:NAME
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    epochs: int = 100
    steps: int | None = None  # optimizer steps of the whole run, in place of epochs
    precision: Literal["no", "bf16", "fp16"] = "no"
    grad_accum: int = 1  # micro-batches a step is split into; the batch size stays
    clip_grad: float | None = None  # largest norm of all gradients together
    seed: int = 0
    deterministic: bool = False  # only algorithms that give the same bits twice
    compile: bool = False  # torch.compile
    device: Literal["auto", "cpu"] = "auto"
    eval_every: int = 1  # epochs
    log_every: int = 10  # steps between two looks at the losses
    output: str | None = None  # the run folder; None: a fresh one under runs/


def load_config(
    method: str, recipe: str | None = None, data: str | None = None, overrides: Iterable[str] = ()
) -> TrainConfig:
    """Defaults, then the recipe, then ``--data``, then the overrides.

    Args:
        method: a registered method, or a folder of recipes whose ``method.name`` says which one (``teacher``).
        recipe: a name under ``recipes/<method>/``, or the path of a YAML file. None: ``digits`` for the digits,
            ``folder`` for other data where the method has that recipe, else the defaults.
        data: a path of images, or ``digits``.
        overrides: ``dotted.key=value``.

    Raises:
        ConfigError: unknown method, recipe or key, or a value of the wrong type.
    """
    path = _find_recipe(method, recipe, "digits" if data in (None, "digits") else "folder")
    layers = [(str(path), _read_yaml(path))] if path else []
    if data is not None:
        layers.append(("--data", _data_layer(data, layers[0][1] if path else None)))
    layers += [(override, _read_override(override)) for override in overrides]
    named = OmegaConf.select(layers[0][1], "method.name") if path and method not in list_methods() else None
    return _build(named or method, layers)


def read_config(path: Path | str) -> TrainConfig:
    """The configuration that a run folder holds. Raises ConfigError naming the file."""
    path = Path(path)
    layer = _read_yaml(path)
    return _build(OmegaConf.select(layer, "method.name") or "", [(str(path), layer)])


def save_config(config: TrainConfig, path: Path | str) -> None:
    """Write `config` as YAML, every value spelt out."""
    write_text(Path(path), OmegaConf.to_yaml(OmegaConf.structured(config)))


def list_recipes() -> list[str]:
    """``method/recipe`` of every recipe that comes with the package."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))


def _find_recipe(method: str, recipe: str | None, default: str) -> Path | None:
    if recipe is None:
        path = RECIPES / method / f"{default}.yaml"
        return path if path.is_file() else None
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise ConfigError(f"there is no recipe file {recipe}")
        return Path(recipe)
    path = RECIPES / method / f"{recipe}.yaml"
    if not path.is_file():
        known = [name.split("/", 1)[1] for name in list_recipes() if name.startswith(f"{method}/")]
        raise ConfigError(f"method {method!r} has no recipe {recipe!r}; it has: {', '.join(known) or 'none'}")
    return path


def _read_yaml(path: Path):
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"cannot read {path}: expected a mapping of options")
    return layer


def _read_override(override: str):
    if "=" not in override:
        raise ConfigError(f"cannot read the override {override!r}: expected key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise ConfigError(f"cannot read the override {override!r}: {error}") from error


def _data_layer(data: str, recipe):
    if data == "digits":
        return OmegaConf.create({"data": {"name": "digits", "path": None}})
    named = OmegaConf.select(recipe, "data.name") if recipe is not None else None
    return OmegaConf.create({"data": {"path": data, "name": "folder" if named in (None, "digits") else named}})


def _build(method: str, layers: list[tuple[str, Any]]) -> TrainConfig:
    """Merge the layers, each with the name that errors give it, over the defaults of `method`."""
    try:
        options = get_method(method).Options
    except ValueError as error:
        raise ConfigError(str(error)) from None
    schema = merged = OmegaConf.structured(TrainConfig(method=options(name=method)))
    for source, layer in layers:
        section = layer.get("method")
        named = section.get("name") if OmegaConf.is_dict(section) else None
        if named not in (None, method):
            raise ConfigError(f"{source}: it is for the method {named!r}, not for {method!r}")
        if layer.get("precision") is False:
            layer.precision = "no"  # which YAML reads as a bool
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_explain(error, schema)}") from None
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from None
    check(config)
    return config


def _explain(error: OmegaConfBaseException, schema) -> str:
    """OmegaConf's message on one line; an unknown key gets its nearest neighbours."""
    message = str(error).splitlines()[0]
    key = error.full_key or ""
    parent = OmegaConf.select(schema, key.rpartition(".")[0]) if "." in key else schema
    if "not in" not in message or not OmegaConf.is_dict(parent):
        return f"{key}: {message}" if key else message
    near = difflib.get_close_matches(key.rpartition(".")[2], list(parent), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(parent)}"
    return f"unknown key {key}; {hint}"


def check(config: TrainConfig) -> None:
    """Raise ConfigError for values that no run can have."""
    data, augment, sched, checkpoint = config.data, config.data.augment, config.sched, config.checkpoint
    bounds = [
        ("at least 1", lambda value: value >= 1, {
            "epochs": config.epochs, "steps": config.steps, "grad_accum": config.grad_accum,
            "eval_every": config.eval_every, "log_every": config.log_every, "checkpoint.keep": checkpoint.keep,
            "data.batch_size": data.batch_size, "data.eval_batch_size": data.eval_batch_size,
            "data.img_size": data.img_size, "data.in_chans": data.in_chans, "data.num_classes": data.num_classes,
            "data.augment.repeats": augment.repeats, "data.augment.recount": augment.recount,
        }),
        ("at least 0", lambda value: value >= 0, {
            "optim.weight_decay": config.optim.weight_decay, "sched.warmup_epochs": sched.warmup_epochs,
            "sched.cooldown_epochs": sched.cooldown_epochs, "checkpoint.every_epochs": checkpoint.every_epochs,
            "checkpoint.every_steps": checkpoint.every_steps, "data.workers": data.workers,
            "data.augment.mixup": augment.mixup, "data.augment.cutmix": augment.cutmix,
            "data.augment.crop_padding": augment.crop_padding, "data.augment.color_jitter": augment.color_jitter,
            "sched.min_lr": sched.min_lr, "sched.warmup_lr": sched.warmup_lr,
        }),
        ("above 0", lambda value: value > 0, {
            "clip_grad": config.clip_grad, "sched.decay_epochs": sched.decay_epochs, "data.crop_pct": data.crop_pct,
            "data.std": min(data.std) if data.std else None,
        }),
        ("in (0, 1]", lambda value: 0 < value <= 1, {"data.train_fraction": data.train_fraction}),
        ("in (0, 1)", lambda value: 0 < value < 1, {"data.eval_fraction": data.eval_fraction}),
        ("in [0, 1)", lambda value: 0 <= value < 1, {"ema.decay": config.ema.decay, "data.augment.zoom": augment.zoom}),
        ("in [0, 1]", lambda value: 0 <= value <= 1, {
            "data.augment.smoothing": augment.smoothing, "data.augment.mixup_prob": augment.mixup_prob,
            "data.augment.mixup_switch_prob": augment.mixup_switch_prob, "data.augment.hflip": augment.hflip,
            "data.augment.vflip": augment.vflip, "data.augment.reprob": augment.reprob,
        }),
        ("in [0, 2^32)", lambda value: 0 <= value < 2**32, {"data.split_seed": data.split_seed}),
    ]  # fmt: skip
    for bound, fits, values in bounds:
        for key, value in values.items():
            if value is not None and not fits(value):
                raise ConfigError(f"{key} must be {bound}, got {value}")
    for key, (low, high) in {"scale": augment.scale, "ratio": augment.ratio}.items():
        if not 0 < low <= high:
            raise ConfigError(f"data.augment.{key} must be [low, high] with 0 < low <= high, got [{low}, {high}]")
    for section in ("model", "data", "optim", "sched"):
        for name in getattr(config, section).kwargs:
            if not str(name).isidentifier():  # which timm, for a value of None, would leave out without a word
                raise ConfigError(f"{section}.kwargs: expected names of arguments, got {name!r}: write {{name: value}}")
    if data.batch_size % config.grad_accum:
        raise ConfigError(f"data.batch_size={data.batch_size} does not split into grad_accum={config.grad_accum} parts")
    if data.name == "digits" and data.path is not None:
        raise ConfigError(f"data.path={data.path} does not go with data.name=digits: give --data, or data.name=folder")
