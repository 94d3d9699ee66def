"""What a run leaves behind for reading: metrics.csv, TensorBoard events, curves.png, and the lines on the screen."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastib.train.checkpoint import write_text


class Metrics:
    """The rows of metrics.csv, one per epoch, mirrored to TensorBoard.

    The file holds nothing that depends on time or machine: a resumed run's is that of an unbroken one.

    Args:
        folder: the run folder.
        step: rows after this step are dropped (they belong to an abandoned continuation).
    """

    def __init__(self, folder: Path, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.path = folder, folder / "metrics.csv"
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, row: dict[str, float]) -> None:
        """Append a row (``step`` and ``epoch`` among its keys) and rewrite the file."""
        self.rows.append(row)
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text(self.path, text.getvalue())
        self.scalars(row, row["step"])

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Send values to TensorBoard alone."""
        for name, value in values.items():
            if name not in ("step", "epoch"):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Draw the curves and close the event file."""
        self.writer.close()
        if self.rows:
            draw_curves({self.folder.name: self.rows}, self.folder / "curves.png")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv as numbers, empty cells left out; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"]), "epoch": int(row["epoch"])} for row in rows]


def draw_curves(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Losses and accuracies of one or several runs over epochs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for label, rows in runs.items():
        prefix = f"{label} " if len(runs) > 1 else ""
        for name in dict.fromkeys(name for row in rows for name in row):
            axis = right if name.endswith("top1") else left
            if name.endswith("top1") or name.startswith("train/") or name == "eval/loss":
                points = [(row["epoch"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points, strict=True), label=prefix + name, marker="." if len(points) < 40 else None)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


class Screen:
    """A progress bar on a terminal, plain lines elsewhere, nothing on the other processes."""

    def __init__(self, total: int, step: int = 0, show: bool = True):
        self.console = Console(quiet=not show, soft_wrap=True, highlight=False)
        self.bar = None
        if self.console.is_terminal:
            text = TextColumn("{task.description}")
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("training", total=total, completed=step)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def step(self, step: int, loss: float) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(self.task, completed=step, description=f"loss {loss:.4f}")

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False)

    def row(self, row: dict[str, float]) -> None:
        """Print the row of an epoch."""
        values = [f"{name} {value:.4g}" for name, value in row.items() if name not in ("step", "epoch")]
        self.line(f"epoch {row['epoch']:>3}  step {row['step']:>6}  " + "  ".join(values))
