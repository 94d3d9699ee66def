"""Accuracy and loss of a model on the evaluation set."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.utils import AverageMeter, accuracy

from fastib.train.build import load_student
from fastib.train.config import read_config
from fastib.train.data import build_data
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


def evaluate_run(folder: Path, data: str | None = None) -> dict[str, float]:
    """Scores of a finished run's student on the run's evaluation images, or on those of the folder `data`.

    Raises CheckpointError where the run has no student yet, DataError where the classes differ.
    """
    config = read_config(folder / CONFIG)
    if data is not None:
        config.data.name, config.data.path = ("digits", None) if data == "digits" else ("folder", data)
    if not (folder / STUDENT).is_file():
        raise CheckpointError(f"there is no {folder / STUDENT}: the run has not finished; go on with --resume {folder}")
    accelerator = Accelerator(cpu=config.device == "cpu")
    rank, world = accelerator.process_index, accelerator.num_processes
    dataset = build_data(config.data, config.seed, rank)
    model = load_student(folder / STUDENT).to(accelerator.device).eval()
    loader, valid = dataset.eval_loader(config.data, rank, world)
    return evaluate(model, loader, accelerator, valid)
