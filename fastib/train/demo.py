"""``make demo``: a CNN teacher, a plain vision transformer and a DearKD student on the handwritten digits."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastib.methods import get_method
from fastib.models import DearKDVisionTransformer
from fastib.nn import MHCA
from fastib.train.build import build_model, load_student, load_teacher
from fastib.train.config import TrainConfig, load_config, read_config
from fastib.train.host_memory import keep_freed_memory
from fastib.train.loop import train
from fastib.train.metrics import draw_curves, read_metrics
from fastib.train.runs import CONFIG, STUDENT

LABELS = {"teacher": "CNN teacher", "plain": "plain ViT", "dearkd": "DearKD student"}
FRACTIONS = {"100": 1.0, "10": 0.1}
LOW_DATA_EPOCHS = {"teacher": 200, "plain": 300, "dearkd": 300}
BACKENDS = {"fused": None, "eager": "reference"}
EVALUATIONS = 10  # of each run at 10 %


def main(argv: list[str] | None = None) -> int:
    """Train the three at 100 % and at 10 % of the images, print the table and the paths of the pictures."""
    parser = argparse.ArgumentParser(prog="python -m fastib.train.demo", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the runs; default: a fresh one, runs/demo-NNN")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", metavar="key=value", help="overrides of all six runs")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    keep_freed_memory()
    console = Console(highlight=False, soft_wrap=True)
    folder = arguments.output or _fresh_folder()
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        percent: run_all(folder / percent, fraction, arguments.seed, arguments.options, console)
        for percent, fraction in FRACTIONS.items()
    }
    console.print("timing the training step, fused and eager")
    times = {"dearkd": digits_step(read_config(folder / "100" / "dearkd" / CONFIG)), "tiny": imagenet_step()}
    pictures = draw(folder, results)
    Console().print(table(results, times))
    console.print(f"{time.perf_counter() - start:.0f} s in all. Logs and students in {folder}; pictures:")
    for path in pictures:
        console.print(f"  {path}")
    return 0


def _fresh_folder() -> Path:
    numbers = (Path("runs") / f"demo-{i:03d}" for i in itertools.count(1))
    return next(path for path in numbers if not path.exists())


class Excerpt(io.TextIOBase):
    """Writes all text to `log`, and the lines of evaluations to `screen`."""

    def __init__(self, log: TextIO, screen: TextIO):
        self.log, self.screen = log, screen

    def write(self, text: str) -> int:
        self.log.write(text)
        self.screen.writelines(f"  {line}\n" for line in text.splitlines() if "eval/top1" in line)
        self.screen.flush()
        return len(text)


def run_all(folder: Path, fraction: float, seed: int, overrides: list[str], console: Console) -> dict[str, dict]:
    """The result of `fastib.train.loop.train` for the teacher, the plain ViT and the DearKD student, in this order."""
    results = {}
    folder.mkdir(exist_ok=True)
    for method, label in LABELS.items():
        options = [f"output={folder / method}", f"seed={seed}", f"data.train_fraction={fraction}"]
        if fraction < 1:
            epochs = LOW_DATA_EPOCHS[method]
            options += [f"epochs={epochs}", f"eval_every={epochs // EVALUATIONS}"]
            options += [f"sched.warmup_epochs={epochs // 10}", "checkpoint.every_epochs=0"]
        if method == "dearkd":
            options.append(f"method.teacher=run:{folder / 'teacher'}")
        console.print(f"{label}, {fraction:.0%} of the training images")
        with (folder / f"{method}.log").open("w") as log, contextlib.redirect_stdout(Excerpt(log, sys.stdout)):
            results[method] = train(load_config(method, "digits", overrides=[*options, *overrides]))
    return results


def digits_step(config: TrainConfig) -> dict[str, float]:
    """Milliseconds of a training step of stage I with the configuration of a finished run; see `race`."""
    data = config.data
    images = torch.randn(data.batch_size, data.in_chans, data.img_size, data.img_size)
    targets = torch.randint(data.num_classes, (data.batch_size,))

    def build() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        student = build_model(config.model.name, config.model.kwargs, data.num_classes, data.in_chans, data.img_size)
        method = get_method("dearkd")(config.method, student, data.num_classes, load_teacher).train()
        return method, lambda: sum(method(images, targets, 0.0).values())

    return race(build, steps=20)


def imagenet_step(batch: int = 8) -> dict[str, float]:
    """Milliseconds of a training step of DearKD-Ti on `batch` images of 224 pixels, without a teacher; see `race`."""
    images = torch.randn(batch, 3, 224, 224)

    def build() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        model = timm.create_model("dearkd_tiny_patch16_224").train()
        return model, lambda: model(images).square().mean()

    return race(build, steps=3)


def race(build: Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]], steps: int) -> dict[str, float]:
    """Median milliseconds of forward, backward and update, with the fused attention and with the eager reference.

    `build` gives a model and a function for its loss. The two take turns, so that a busy machine slows both.
    """
    runners = {}
    for name, backend in BACKENDS.items():
        model, loss = build()
        for module in model.modules():
            if isinstance(module, MHCA):
                module.backend = backend
        runners[name] = loss, torch.optim.AdamW(model.parameters(), lr=0.0)
    seconds = {name: [] for name in runners}
    for _ in range(1 + steps):
        for name, (loss, optimizer) in runners.items():
            clock = time.perf_counter()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - clock)
    return {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}


def table(results: dict[str, dict[str, dict]], times: dict[str, dict[str, float]]) -> Table:
    """One row per model: test accuracies and time per training step."""
    grid = Table(title="scikit-learn's handwritten digits, 8 x 8 pixels: accuracy on 360 test images")
    grid.add_column("model", no_wrap=True)
    for percent in results:
        grid.add_column(f"{percent} % of\nimages", justify="right")
    for name in BACKENDS:
        grid.add_column(f"ms per step,\n{name}", justify="right")
    for method, label in LABELS.items():
        accuracies = [f"{runs[method]['top1']:.1f} %" for runs in results.values()]
        grid.add_row(
            label, *accuracies, *(f"{times[method][name]:.1f}" if method in times else "" for name in BACKENDS)
        )
    speed = (f"{times['tiny'][name]:.0f}" for name in BACKENDS)
    grid.add_row("DearKD-Ti, 8 images of 224 px", *([""] * len(results)), *speed)
    return grid


def draw(folder: Path, results: dict[str, dict[str, dict]]) -> list[Path]:
    """Curves per share of the images, and where the heads look."""
    pictures = []
    for percent, runs in results.items():
        rows = {label: read_metrics(Path(runs[m]["folder"]) / "metrics.csv") for m, label in LABELS.items()}
        shown = {"step", "epoch", "eval/top1", "eval/loss"}
        rows = {label: [{k: v for k, v in row.items() if k in shown} for row in rows[label]] for label in rows}
        pictures.append(folder / f"curves-{percent}.png")
        draw_curves(rows, pictures[-1])
    pictures.append(folder / "heads.png")
    draw_heads(load_student(folder / "100" / "dearkd" / STUDENT), pictures[-1])
    return pictures


def draw_heads(model: DearKDVisionTransformer, path: Path) -> None:
    """Centers of the heads of every MHCA block as a PNG, before (grey) and after training.

    The radius of a head's circle is 1 / sqrt(2 alpha), the standard deviation of the Gaussian that its bias describes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    blocks = [block.attn for block in model.blocks if isinstance(block.attn, MHCA)]
    figure = Figure(figsize=(3 * len(blocks), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (axis, trained) in enumerate(zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True)):
        start = MHCA(trained.num_heads, trained.num_heads, trained.grid_size)
        for attention, color in ((start, "0.7"), (trained, "C0")):
            for alpha, (row, column) in zip(attention.alpha.tolist(), attention.center.tolist(), strict=True):
                axis.plot(column, row, ".", color=color)
                axis.add_patch(Circle((column, row), (2 * max(alpha, 1e-2)) ** -0.5, fill=False, color=color))
        axis.set(title=f"block {i}", aspect="equal", xlim=(-3, 3), ylim=(3, -3), xlabel="columns from the query")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
