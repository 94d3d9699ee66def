"""Optimizer, schedule and mixup of a run: timm's, from the configuration."""

from __future__ import annotations

from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from fastib.train.config import OptimConfig, SchedConfig, TrainConfig
from fastib.train.errors import ConfigError


def make_optimizer(method, config: OptimConfig):
    """An optimizer of the method's trainable parameters. Raises ConfigError for what timm refuses."""
    try:
        return create_optimizer_v2(
            method, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            filter_bias_and_bn=config.filter_bias_and_bn, **config.kwargs,
        )  # fmt: skip
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"optim: cannot make the optimizer {config.opt}: {error}") from error


def make_scheduler(optimizer, config: SchedConfig, total: int, steps_per_epoch: int):
    """A schedule over steps, a function of the step alone, so it has no place in a checkpoint.

    Args:
        total: steps of the run.
        steps_per_epoch: for what the configuration gives in epochs.
    """
    options = dict(config.kwargs)
    if config.decay_epochs is not None:
        options["decay_epochs"] = config.decay_epochs * steps_per_epoch
    if "decay_milestones" in options:
        options["decay_milestones"] = [milestone * steps_per_epoch for milestone in options["decay_milestones"]]
    length = total - round(config.cooldown_epochs * steps_per_epoch)
    if length < 1:
        raise ConfigError(f"sched.cooldown_epochs={config.cooldown_epochs} leaves no step of the {total}")
    warmup = round(config.warmup_epochs * steps_per_epoch)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=config.sched, num_epochs=length, warmup_epochs=warmup, warmup_lr=config.warmup_lr,
            min_lr=config.min_lr, decay_rate=config.decay_rate, step_on_epochs=False, updates_per_epoch=1, **options,
        )  # fmt: skip
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"sched: cannot make the schedule {config.sched}: {error}") from error
    return scheduler


def make_mixup(config: TrainConfig, world: int) -> Mixup | None:
    """Mixup, CutMix and label smoothing, or None where none is on. It draws from NumPy's global generator."""
    augment = config.data.augment
    mixes = bool(augment.mixup or augment.cutmix)
    if not (mixes or augment.smoothing):
        return None
    if (config.data.batch_size // (config.grad_accum * world)) % 2:
        raise ConfigError("mixup, cutmix and smoothing need an even number of images in each micro-batch")
    return Mixup(
        mixup_alpha=augment.mixup, cutmix_alpha=augment.cutmix, prob=augment.mixup_prob if mixes else 0.0,
        switch_prob=augment.mixup_switch_prob, mode=augment.mixup_mode, label_smoothing=augment.smoothing,
        num_classes=config.data.num_classes,
    )  # fmt: skip
