"""The run folder, and the signals that end a run."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from fastib.train.config import TrainConfig
from fastib.train.errors import ConfigError

CONFIG, RESULT, STUDENT = "config.yaml", "result.json", "student.safetensors"


def fresh_folder(config: TrainConfig) -> Path:
    """Make the folder of a new run: ``config.output``, or the first free ``runs/METHOD-DATA-NNN``.

    Raises ConfigError where ``config.output`` already holds a run or cannot be made.
    """
    if config.output is not None:
        folder = Path(config.output)
        if (folder / CONFIG).exists():
            raise ConfigError(f"{folder} already holds a run: go on with --resume {folder}, or choose another output=")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output={folder}: cannot make the folder: {error}") from error
        return folder
    stem = f"{config.method.name}-{config.data.name.replace('/', '-')}"
    number = 1
    while True:
        folder = Path("runs") / f"{stem}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def claim_folder(config: TrainConfig) -> Path:
    """`fresh_folder`, made by the main process and known to all of them."""
    found: list = [None]
    if PartialState(cpu=config.device == "cpu").is_main_process:
        try:
            found = [fresh_folder(config)]
        except ConfigError as error:
            found = [error]
    folder = broadcast_object_list(found)[0]
    if isinstance(folder, ConfigError):
        raise folder
    config.output = str(folder)
    return folder


class Signals:
    """Inside the block SIGINT and SIGTERM only set `caught`; a second one of them acts as usual."""

    def __init__(self):
        self.caught: int | None = None
        self.previous: dict[int, object] = {}

    def _catch(self, signum: int, _frame) -> None:
        self.caught = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.previous[signum] = signal.signal(signum, self._catch)
        return self

    def __exit__(self, *_):
        self._restore()
