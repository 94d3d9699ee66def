"""Accuracy and loss of a model on the evaluation set, and what its method measures beside them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.utils import AverageMeter, accuracy

from fastib.methods import Method, get_method
from fastib.train.build import load_student, load_teacher
from fastib.train.config import TrainConfig, read_config
from fastib.train.data import Data, build_data
from fastib.train.errors import CheckpointError
from fastib.train.runs import CONFIG, STUDENT


@torch.no_grad()
def evaluate(forward, loader, accelerator, valid: int | None = None) -> dict[str, float]:
    """Mean cross entropy, top-1 and top-5 accuracy in percent, over the images of all processes.

    Args:
        forward: images to logits, in eval mode.
        loader: batches of this process.
        valid: how many of its leading images count; None: all.
    """
    loss, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    for images, targets in loader:
        count = len(targets) if valid is None else min(len(targets), valid - loss.count)
        images, targets = send_to_device((images, targets), accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = forward(images).float()
        if count == 0:
            continue
        logits, targets = logits[:count], targets[:count]
        loss.update(F.cross_entropy(logits, targets).item(), count)
        for meter, value in zip((top1, top5), accuracy(logits, targets, topk=(1, 5)), strict=True):
            meter.update(value.item(), count)
    sums = torch.tensor([loss.sum, top1.sum, top5.sum, loss.count], dtype=torch.float64, device=accelerator.device)
    total, *correct, images = accelerator.reduce(sums, reduction="sum").tolist()
    scores = {name: 100 * round(value / 100) / images for name, value in zip(("top1", "top5"), correct, strict=True)}
    return {"loss": total / images, **scores}


@torch.no_grad()
def measure(method: Method, loader, accelerator, valid: int | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Means of `Method.measure` over the images of all processes, by table, row and column; arguments of `evaluate`."""
    sums, seen = {}, 0
    for images, targets in loader:
        count = len(targets) if valid is None else min(len(targets), valid - seen)
        images, targets = send_to_device((images, targets), accelerator.device, non_blocking=True)
        with accelerator.autocast():
            values = method.measure(images, targets)
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + value[:count].double().sum()
        seen += count
    total = torch.stack([*sums.values(), torch.tensor(seen, dtype=torch.float64, device=accelerator.device)])
    *totals, images = accelerator.reduce(total, reduction="sum").tolist()
    tables = {}
    for (table, row, column), value in zip(sums, totals, strict=True):
        tables.setdefault(table, {}).setdefault(row, {})[column] = value / images
    return tables


def evaluate_run(folder: Path, data: str | None = None) -> dict:
    """Scores of a finished run's student on the run's evaluation images, or on those of another folder, `data`.

    Where that folder has no split of its own, all of its images count.

    Beside loss, top1 and top5 there are the tables of the run's method, see `Method.measure`; they are left out with a
    warning where a teacher is not there any more.

    Raises CheckpointError where the run has no student yet, DataError where the classes differ in number or, as far as
    they are known, in name or order.
    """
    config = read_config(folder / CONFIG)
    if data is not None:
        if os.path.realpath(data) != os.path.realpath(config.data.path or "digits"):
            config.data.train_fraction = config.data.eval_fraction = 1.0
        config.data.name, config.data.path = ("digits", None) if data == "digits" else ("folder", data)
    if not (folder / STUDENT).is_file():
        raise CheckpointError(f"there is no {folder / STUDENT}: the run has not finished; go on with --resume {folder}")
    accelerator = Accelerator(cpu=config.device == "cpu")
    rank, world = accelerator.process_index, accelerator.num_processes
    dataset = build_data(config.data, config.seed, rank)
    model = load_student(folder / STUDENT).to(accelerator.device).eval()
    loader, valid = dataset.eval_loader(config.data, rank, world)
    return evaluate(model, loader, accelerator, valid) | _tables(config, model, dataset, accelerator)


def _tables(config: TrainConfig, model, dataset: Data, accelerator) -> dict:
    cls = get_method(config.method.name)
    if cls.measure is Method.measure:
        return {}
    try:
        method = cls(config.method, model, config.data.num_classes, load_teacher)
    except CheckpointError as error:
        warnings.warn(f"the tables of {config.method.name} are left out: {error}", stacklevel=3)
        return {}
    method.to(accelerator.device).eval()
    loader, valid = dataset.eval_loader(config.data, accelerator.process_index, accelerator.num_processes)
    return measure(method, loader, accelerator, valid)
