"""``make demo``: a CNN teacher, a plain vision transformer and a DearKD student on the handwritten digits."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

from fastib.methods import get_method
from fastib.models import DearKDVisionTransformer
from fastib.nn import MHCA
from fastib.train.build import build_model, load_student, load_teacher
from fastib.train.config import TrainConfig, load_config, read_config
from fastib.train.loop import train
from fastib.train.metrics import draw_curves, read_metrics
from fastib.train.runs import CONFIG, STUDENT

LABELS = {"teacher": "CNN teacher", "plain": "plain ViT", "dearkd": "DearKD student"}
LOW_DATA = 0.1
LOW_DATA_EPOCHS = {"teacher": 200, "plain": 300, "dearkd": 300}
STEP_BACKENDS = {"fused": None, "eager": "reference"}


def main(argv: list[str] | None = None) -> int:
    """Train the three at 100 % and at 10 % of the images, print the table and the paths of the pictures."""
    parser = argparse.ArgumentParser(prog="python -m fastib.train.demo", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the runs; default: a fresh one, runs/demo-NNN")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", metavar="key=value", help="overrides of all six runs")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    folder = arguments.output or _fresh_folder()
    results = {f: run_all(folder / f"{f:.0%}", f, arguments.seed, arguments.options) for f in (1.0, LOW_DATA)}
    times = step_times(read_config(Path(results[1.0]["dearkd"]["folder"]) / CONFIG))
    pictures = draw(folder, results)
    console = Console()
    console.print(table(results, times))
    console.print(f"{time.perf_counter() - start:.0f} s in all. Pictures:", highlight=False)
    for path in pictures:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return 0


def _fresh_folder() -> Path:
    numbers = (Path("runs") / f"demo-{i:03d}" for i in itertools.count(1))
    return next(path for path in numbers if not path.exists())


def run_all(folder: Path, fraction: float, seed: int, overrides: list[str]) -> dict[str, dict]:
    """The result of `fastib.train.loop.train` for the teacher, the plain ViT and the DearKD student, in this order."""
    results = {}
    for method in LABELS:
        options = [f"output={folder / method}", f"seed={seed}", f"data.train_fraction={fraction}"]
        if fraction < 1:
            epochs = LOW_DATA_EPOCHS[method]
            options += [f"epochs={epochs}", f"eval_every={epochs // 20}", f"sched.warmup_epochs={epochs // 10}"]
        if method == "dearkd":
            options.append(f"method.teacher=run:{folder / 'teacher'}")
        results[method] = train(load_config(method, "digits", overrides=[*options, *overrides]))
    return results


def step_times(config: TrainConfig, steps: int = 20) -> dict[str, float]:
    """Milliseconds of a DearKD training step of stage I, with the fused attention and with the eager reference.

    `config` is that of a finished run. The two take turns, so that a busy machine slows both; medians are given.
    """
    data = config.data
    images = torch.randn(data.batch_size, data.in_chans, data.img_size, data.img_size)
    targets = torch.randint(data.num_classes, (data.batch_size,))
    methods = {}
    for name, backend in STEP_BACKENDS.items():
        student = build_model(config.model.name, config.model.kwargs, data.num_classes, data.in_chans, data.img_size)
        for module in student.modules():
            if isinstance(module, MHCA):
                module.backend = backend
        method = get_method("dearkd")(config.method, student, data.num_classes, load_teacher).train()
        methods[name] = method, torch.optim.AdamW(method.parameters(), lr=0.0)
    seconds = {name: [] for name in methods}
    for _ in range(3 + steps):
        for name, (method, optimizer) in methods.items():
            clock = time.perf_counter()
            sum(method(images, targets, 0.0).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - clock)
    return {name: 1000 * statistics.median(values[3:]) for name, values in seconds.items()}


def table(results: dict[float, dict[str, dict]], times: dict[str, float]) -> Table:
    """One row per model: test accuracies and time per training step."""
    grid = Table(title="scikit-learn's handwritten digits, 8 x 8 pixels, 360 test images")
    grid.add_column("model")
    grid.add_column("parameters", justify="right")
    for fraction in results:
        grid.add_column(f"accuracy, {fraction:.0%}\nof the images", justify="right")
    for name in times:
        grid.add_column(f"ms per step,\n{name}", justify="right")
    for method, label in LABELS.items():
        runs = [runs[method] for runs in results.values()]
        speed = [f"{ms:.1f}" for ms in times.values()] if method == "dearkd" else [""] * len(times)
        grid.add_row(label, f"{runs[0]['parameters']:,}", *(f"{run['top1']:.1f} %" for run in runs), *speed)
    return grid


def draw(folder: Path, results: dict[float, dict[str, dict]]) -> list[Path]:
    """Curves per share of the images, and where the heads of the first blocks look."""
    pictures = []
    for fraction, runs in results.items():
        rows = {LABELS[m]: read_metrics(Path(run["folder"]) / "metrics.csv") for m, run in runs.items()}
        keep = {"step", "epoch", "eval/top1", "eval/loss"}
        rows = {label: [{k: v for k, v in row.items() if k in keep} for row in table] for label, table in rows.items()}
        pictures.append(folder / f"curves-{fraction:.0%}.png".replace("%", ""))
        draw_curves(rows, pictures[-1])
    pictures.append(folder / "heads.png")
    draw_heads(load_student(Path(results[1.0]["dearkd"]["folder"]) / STUDENT), pictures[-1])
    return pictures


def draw_heads(model: DearKDVisionTransformer, path: Path) -> None:
    """Centers of the heads of every MHCA block as a PNG, before (grey) and after training.

    The radius of a head's circle is 1 / sqrt(2 alpha), the standard deviation of the Gaussian that its bias describes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    fresh = timm.create_model(
        "dearkd_tiny_patch16_224", embed_dim=model.embed_dim, num_heads=model.blocks[0].attn.num_heads
    )
    figure = Figure(figsize=(3 * model.mhca_depth, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, axis in enumerate(figure.subplots(1, model.mhca_depth, squeeze=False)[0]):
        for attention, color in ((fresh.blocks[0].attn, "0.7"), (model.blocks[i].attn, "C0")):
            for alpha, (row, column) in zip(attention.alpha.tolist(), attention.center.tolist(), strict=True):
                axis.plot(column, row, ".", color=color)
                axis.add_patch(Circle((column, row), (2 * max(alpha, 1e-2)) ** -0.5, fill=False, color=color))
        axis.set(title=f"block {i}", aspect="equal", xlim=(-3, 3), ylim=(3, -3), xlabel="columns from the query")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
