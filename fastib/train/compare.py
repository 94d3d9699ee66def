"""``fastib compare``: all methods on one data set, at several shares of its training images and several seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastib.methods import list_methods
from fastib.train.checkpoint import write_text
from fastib.train.config import TrainConfig, load_config
from fastib.train.data import build_data
from fastib.train.errors import ConfigError
from fastib.train.loop import resume, train
from fastib.train.runs import CONFIG, RESULT

SETTINGS, TABLE, NUMBERS, PICTURE = "compare.json", "compare.md", "compare.csv", "compare.png"
BASELINE = "plain"


@dataclass
class Comparison:
    """What is run.

    Attributes:
        output: folder; each run is METHOD-PERCENT-SEED below it.
        data: "digits", or a path as for ``fastib train``.
        methods: their names; empty: all there are.
        fractions: shares of the training images, in (0, 1].
        seeds: of the runs; the images of a share are the same for all.
        epochs: of every student with all images; None: those of the baseline's recipe. With a share of the images there
            are as many times more, and so of warm-up epochs and of teachers', so that all take about as many steps.
        options: ``key=value`` over every recipe, ``METHOD:key=value`` over that of one method.
    """

    output: Path
    data: str = "digits"
    methods: list[str] = field(default_factory=list)
    fractions: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.1])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    epochs: int | None = None
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output, known = Path(self.output), list_methods()
        for name in self.methods:
            if name not in known:
                raise ConfigError(f"unknown method {name!r}; known methods: {', '.join(known)}")
        for option in self.options:
            owner, separator, _ = option.partition("=")[0].partition(":")
            if separator and owner not in known:
                raise ConfigError(f"{option}: unknown method {owner!r}; known methods: {', '.join(known)}")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(f"fractions must be in (0, 1], got {fraction}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1, got {self.epochs}")
        if not self.fractions or not self.seeds:
            raise ConfigError("a comparison needs at least one fraction and one seed")
        self.methods = sorted(set(self.methods or known), key=lambda name: (name != BASELINE, name))
        self.epochs = self.epochs or load_config(BASELINE, None, self.data).epochs

    def folder(self, method: str, fraction: float, seed: int) -> Path:
        """Of one run."""
        return self.output / f"{method}-{100 * fraction:g}-{seed}"

    def configure(self, method: str, fraction: float, seed: int) -> TrainConfig:
        """Of one run."""
        own = f"{method}:"
        common = [option for option in self.options if ":" not in option.partition("=")[0]]
        overrides = common + [option.removeprefix(own) for option in self.options if option.startswith(own)]
        config = load_config(method, None, self.data, overrides)
        config.data.train_fraction *= fraction
        config.seed, config.output = seed, str(self.folder(method, fraction, seed))
        stretch(config, self.epochs / config.epochs / fraction)
        for teacher in config.teachers.values():
            teacher.options = [*teacher.options, *stretched(teacher.recipe, teacher.options, 1 / fraction)]
        return config


def stretch(config: TrainConfig, factor: float) -> None:
    """A run `factor` times as many epochs long, warm-up included, evaluated and checkpointed as often as before."""
    config.epochs = max(round(config.epochs * factor), 1)
    config.sched.warmup_epochs *= factor
    config.eval_every = max(round(config.eval_every * factor), 1)
    every = config.checkpoint.every_epochs
    config.checkpoint.every_epochs = max(round(every * factor), 1) if every else 0


def stretched(recipe: str, options: Sequence[str], factor: float) -> list[str]:
    """Overrides that make a teacher's recipe, ``METHOD/NAME`` or a YAML file, `factor` times as long."""
    is_file = recipe.endswith((".yaml", ".yml"))
    method, _, name = ("teacher", "", recipe) if is_file else recipe.rpartition("/")
    teacher = load_config(method, name, overrides=options)
    if teacher.steps is not None:
        return []
    stretch(teacher, factor)
    return [
        f"epochs={teacher.epochs}",
        f"sched.warmup_epochs={teacher.sched.warmup_epochs}",
        f"eval_every={teacher.eval_every}",
        f"checkpoint.every_epochs={teacher.checkpoint.every_epochs}",
    ]


def compare(comparison: Comparison) -> list[Path]:
    """Run what has not been run yet, go on with what was broken off, and write table, numbers and picture.

    They are written anew after every run. Raises ConfigError where the folder holds a comparison with other settings.
    """
    smallest = min(comparison.fractions)
    for method in comparison.methods:  # a wrong option, or a share of less than a batch, ends here
        config = comparison.configure(method, smallest, comparison.seeds[0])
        if not (comparison.folder(method, smallest, comparison.seeds[0]) / RESULT).is_file():
            build_data(config.data, config.seed).steps_per_epoch(config.data.batch_size, config.grad_accum)
    comparison.output.mkdir(parents=True, exist_ok=True)
    _claim(comparison)
    scores: dict[tuple[str, float], dict[int, float]] = {}
    files: list[Path] = []
    for seed in comparison.seeds:
        for fraction in comparison.fractions:
            for method in comparison.methods:
                scores.setdefault((method, fraction), {})[seed] = _score(comparison, method, fraction, seed)
                files = write(comparison, scores)
    return files


def _claim(comparison: Comparison) -> None:
    """Methods, fractions and seeds may grow from call to call; what decides how a run is made may not change."""
    path = comparison.output / SETTINGS
    settings = {"data": comparison.data, "epochs": comparison.epochs, "options": comparison.options}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if found.get(name) != value]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{comparison.output} holds a comparison with {name}={found.get(name)}, not {settings[name]}: "
                "choose another --output"
            )
    else:
        write_text(path, json.dumps(settings, indent=2) + "\n")


def _score(comparison: Comparison, method: str, fraction: float, seed: int) -> float:
    """Test accuracy of one run in percent, from its result where there is one."""
    folder = comparison.folder(method, fraction, seed)
    if (folder / RESULT).is_file():
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))["top1"]
    if (folder / CONFIG).is_file():
        return resume(folder)["top1"]
    return train(comparison.configure(method, fraction, seed))["top1"]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error where there is more than one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def write(comparison: Comparison, scores: dict[tuple[str, float], dict[int, float]]) -> list[Path]:
    """Table (Markdown), numbers (CSV) and picture of `scores`: by method and fraction, accuracies by seed."""
    paths = [comparison.output / name for name in (TABLE, NUMBERS, PICTURE)]
    write_text(paths[0], table(comparison, scores))
    write_text(paths[1], numbers(scores))
    draw(comparison, scores, paths[2])
    return paths


def table(comparison: Comparison, scores: dict[tuple[str, float], dict[int, float]]) -> str:
    """Methods by shares of the training images: mean +- standard error over the seeds, in percent."""
    fractions = sorted({fraction for _, fraction in scores}, reverse=True)
    lines = ["| method | " + " | ".join(f"{100 * fraction:g} %" for fraction in fractions) + " |"]
    lines.append("|---|" + "---:|" * len(fractions))
    for method in comparison.methods:
        cells = []
        for fraction in fractions:
            values = list(scores.get((method, fraction), {}).values())
            mean, error = mean_and_error(values) if values else (None, None)
            cells.append("" if mean is None else f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def numbers(scores: dict[tuple[str, float], dict[int, float]]) -> str:
    """The same as CSV, with the accuracy of each seed."""
    seeds = sorted({seed for values in scores.values() for seed in values})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["method", "fraction", "runs", "mean", "standard_error", *(f"seed_{seed}" for seed in seeds)])
    for (method, fraction), values in scores.items():
        mean, error = mean_and_error(list(values.values()))
        rows.writerow([method, fraction, len(values), round(mean, 4), "" if error is None else round(error, 4),
                       *(values.get(seed, "") for seed in seeds)])  # fmt: skip
    return text.getvalue()


def draw(comparison: Comparison, scores: dict[tuple[str, float], dict[int, float]], path: Path) -> None:
    """Accuracy against the share of the training images, a line for each method, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for method in comparison.methods:
        own = {fraction: list(values.values()) for (name, fraction), values in scores.items() if name == method}
        points = [(fraction, *mean_and_error(own[fraction])) for fraction in sorted(own)]
        if points:
            shares, means, errors = zip(*points, strict=True)
            style = {"color": "black", "linestyle": "--"} if method == BASELINE else {}
            axis.errorbar([100 * s for s in shares], means, [e or 0.0 for e in errors], label=method, marker="o",
                          markersize=4, capsize=3, linewidth=1.4, **style)  # fmt: skip
    ticks = [100 * fraction for fraction in sorted({fraction for _, fraction in scores})]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="share of the training images, %", ylabel="top-1 accuracy, %", title=str(comparison.data))
    axis.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")  # beside the lines, not over them
    figure.savefig(path, dpi=120)
