"""The command line: ``fastib train``, ``teacher``, ``eval``, ``analyze``, ``compare`` and ``info``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastib.train.errors import ConfigError, HarnessError, Stopped
from fastib.train.host_memory import keep_freed_memory
from fastib.train.processes import leave_process_group


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for an error shown on stderr, 128 + signal for a stopped run."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)  # argparse leaves words that follow an option
    if any(word.startswith("-") for word in rest) or (rest and arguments.run not in (_train, _analyze, _compare)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    keep_freed_memory()
    try:
        code = arguments.run(arguments) or 0
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        code = 128 + stopped.signum
    except (HarnessError, OSError) as error:  # a disk that is full, a folder that cannot be written to
        print(f"error: {_message(error)}", file=sys.stderr)
        return 1  # in the group: another process may still wait for this one in it, and learns of its end
    leave_process_group()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastib", description="Vision transformers with inductive biases.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a student with a method", description=(
        "Train a student. Options are key=value with the keys of the recipe, for example "
        "model.name=vit_tiny_patch16_224 optim.lr=1e-3 data.train_fraction=0.1"))  # fmt: skip
    train.add_argument("words", nargs="*", metavar="METHOD key=value", help="see `fastib info` for the methods")
    teacher = commands.add_parser("teacher", help="train a teacher")
    teacher.add_argument("words", nargs="*", metavar="key=value")
    train.set_defaults(method=None)
    teacher.set_defaults(method="teacher")
    for command in (train, teacher):
        command.add_argument("--recipe", help="a recipe of the method, or a YAML file")
        command.add_argument("--data", help="a folder of images, or digits")
        command.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
        command.set_defaults(run=_train)
    evaluate = commands.add_parser("eval", help="evaluate the student of a finished run")
    evaluate.add_argument("folder", metavar="RUN")
    evaluate.add_argument("--data", help="another folder of images with the same classes, by name")
    evaluate.add_argument("--localization", metavar="BOXES", help=(
        "how well the averaged attention maps find the objects of --data, a folder of images: MaxBoxAcc for the boxes "
        "of a CSV file with the columns image,x0,y0,x1,y1, in pixels"))  # fmt: skip
    evaluate.add_argument("--overlays", type=int, default=0, metavar="N", help=(
        "with --localization: draw the attention on the first N images, into RUN/overlays"))  # fmt: skip
    evaluate.set_defaults(run=_eval)
    analyze = commands.add_parser("analyze", help="read something off a finished run", description=(
        "Options are key=value. For a run of the method aal: links threshold=0.05; "
        "for one of dhvt: head-tokens layer=2 count=8"))  # fmt: skip
    analyze.add_argument("name", metavar="WHAT")
    analyze.add_argument("folder", metavar="RUN")
    analyze.add_argument("words", nargs="*", metavar="key=value")
    analyze.set_defaults(run=_analyze)
    compare = commands.add_parser("compare", help="all methods on one data set, at several shares of it", description=(
        "Options are key=value over every recipe, or METHOD:key=value over that of one method. A comparison that was "
        "stopped goes on where it is called again; methods, fractions and seeds may be added."))  # fmt: skip
    compare.add_argument("words", nargs="*", metavar="METHOD key=value", help="methods to compare; all where none")
    compare.add_argument("--data", default="digits", help="a folder of images, or digits")
    compare.add_argument("--fractions", default="1,0.5,0.25,0.1", help="shares of the training images, with commas")
    compare.add_argument("--seeds", default="0,1,2", help="with commas")
    compare.add_argument("--epochs", type=int, help="with all images; those of the plain recipe where not given")
    compare.add_argument("--output", default="runs/compare", metavar="FOLDER")
    compare.set_defaults(run=_compare)
    commands.add_parser("info", help="versions, backends, methods, recipes, models").set_defaults(run=_info)
    return parser


def _train(arguments) -> None:
    from fastib.train.config import load_config
    from fastib.train.loop import resume, train

    method, options = arguments.method, [*arguments.words, *arguments.rest]
    if method is None and options and "=" not in options[0]:
        method = options.pop(0)
    if arguments.resume is not None:
        if options or arguments.recipe or arguments.data:
            raise ConfigError("a resumed run keeps its configuration: give --resume alone")
        resume(arguments.resume)
        return
    if method is None:
        raise ConfigError("which method? For example: fastib train plain")
    train(load_config(method, arguments.recipe, arguments.data, options))


def _eval(arguments) -> None:
    from fastib.train.evaluate import evaluate_run
    from fastib.train.localize import localize_run

    if arguments.localization is None:
        if arguments.overlays:
            raise ConfigError("--overlays goes with --localization")
        scores = evaluate_run(Path(arguments.folder), arguments.data)
    else:
        scores = localize_run(Path(arguments.folder), arguments.data, arguments.localization, arguments.overlays)
    print(json.dumps(scores, indent=2))
    _show_tables({name: rows for name, rows in scores.items() if isinstance(rows, dict)})


def _analyze(arguments) -> None:
    from fastib.train.analyze import analyze_run

    analysis = analyze_run(arguments.name, Path(arguments.folder), [*arguments.words, *arguments.rest])
    _show_tables(analysis.tables, stderr=False)
    for path in analysis.files:
        print(f"wrote {path}")
    if analysis.note:
        print(analysis.note)


def _compare(arguments) -> None:
    from fastib.train.compare import Comparison, compare

    words = [*arguments.words, *arguments.rest]
    comparison = Comparison(
        Path(arguments.output), arguments.data, [word for word in words if "=" not in word],
        _numbers("--fractions", arguments.fractions, float), _numbers("--seeds", arguments.seeds, int),
        arguments.epochs, [word for word in words if "=" in word],
    )  # fmt: skip
    files = compare(comparison)
    print(files[0].read_text(encoding="utf-8"))
    for path in files:
        print(f"wrote {path}")


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(word) for word in text.split(",") if word]
    except ValueError:
        raise ConfigError(f"{name}: expected numbers with commas between them, got {text!r}") from None


def _show_tables(tables: dict[str, dict[str, dict[str, float | str]]], stderr: bool = True) -> None:
    """Tables for people; on stderr where stdout is JSON."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=stderr, highlight=False)
    console = console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        grid = Table("", title=title)
        for column in columns:
            grid.add_column(column, justify="right", overflow="fold")
        for name, row in rows.items():
            cells = (row.get(column, "") for column in columns)
            grid.add_row(name, *(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells))
        console.print(grid)


def _info(_arguments) -> None:
    import timm
    import torch

    import fastib
    import fastib.models
    from fastib.methods import list_methods
    from fastib.train.config import list_recipes

    versions = {"fastib": fastib.__version__, "torch": torch.__version__, "timm": timm.__version__,
                "python": sys.version.split()[0]}  # fmt: skip
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices:  {os.cpu_count()} CPU threads" + "".join(f", {name}" for name in devices))
    print("build:    " + ", ".join(f"{key}: {value}" for key, value in _build_info(fastib).items()))
    print("backends:")
    for op, backends in fastib.backends().items():
        for backend, state in backends.items():
            print(f"  {op:24} {backend:10} {'yes' if state is True else state}")
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("fastib.")]
    print("models:   " + ", ".join(ours))
    print("methods:  " + ", ".join(list_methods()))
    print("recipes:  " + ", ".join(list_recipes()))


def _build_info(fastib) -> dict:
    try:
        return dict(fastib.build_info())
    except (AttributeError, ImportError, RuntimeError) as error:
        return {"native library": str(error)}


def _message(error: Exception) -> str:
    """The message on one line; of an error in a loader process, its last line, without that process's traceback."""
    text = str(error).strip()
    text = text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
