"""The training loop. It runs any method on accelerate: one process, DDP or FSDP2."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from timm.utils import ModelEmaV3
from torch import nn

from fastib.methods import Method, get_method
from fastib.train.build import build_model, describe, load_teacher, load_weights, save_student, try_out
from fastib.train.checkpoint import Checkpoints, write_text
from fastib.train.config import TrainConfig, read_config, save_config
from fastib.train.data import Data, build_data
from fastib.train.errors import CheckpointError, ConfigError, DivergedError, Stopped
from fastib.train.evaluate import evaluate
from fastib.train.metrics import Metrics, Screen
from fastib.train.optim import make_mixup, make_optimizer, make_scheduler
from fastib.train.runs import CONFIG, RESULT, STUDENT, Signals, claim_folder
from fastib.train.seeding import STEP, seed_all
from fastib.train.state import gather_state, gather_weights, restore_state
from fastib.train.teachers import own_teachers, uses_own_teachers


def train(config: TrainConfig) -> dict:
    """Run `config` in a fresh folder to its end; before it, the teachers that its method names as ``own:NAME``.

    A teacher's run is RUN/teachers/NAME. One that is finished is used as it is, one that was broken off goes on.
    Returns what result.json holds: accuracies, steps, seconds, and ``folder``.
    """
    if uses_own_teachers(config):
        data = build_data(config.data, config.seed)
        data.steps_per_epoch(config.data.batch_size, config.grad_accum)
        _try_method(config, data)
        for teacher in own_teachers(config, claim_folder(config)):
            folder = Path(teacher.output)
            try:
                resume(folder) if (folder / CONFIG).is_file() else train(teacher)
            except Stopped as stopped:
                raise Stopped(f"{stopped}; then {_again(config.output)}", stopped.signum) from None
    return Trainer(config).fit()


def _again(output: str | Path) -> str:
    return f"give the command that began the run once more, with output={output}"


def _try_method(config: TrainConfig, data: Data) -> None:
    """Build student and method with untrained teachers: what is wrong with them ends before the teachers' hours."""
    config = copy.deepcopy(config)
    untrained = {f"run:{teacher.output}": teacher for teacher in own_teachers(config, Path(config.output or "-"))}
    for teacher in untrained.values():
        try:
            data.steps_per_epoch(teacher.data.batch_size, teacher.grad_accum)
        except ConfigError as error:
            raise ConfigError(f"teachers.{Path(teacher.output).name}: {error}") from None

    def load(source: str) -> nn.Module:
        teacher = untrained.get(source)
        return _teacher(config, source) if teacher is None else build_model(**describe(teacher.model, teacher.data))

    _method(config, load)


def _method(config: TrainConfig, load: Callable[[str], nn.Module]) -> Method:
    """The method around a new student, of a run whose data are known; `load` makes teachers. Raises ConfigError."""
    model = build_model(**describe(config.model, config.data), pretrained=config.model.pretrained)
    student = try_out(model, config.data, f"the model {config.model.name}")
    try:
        return get_method(config.method.name)(config.method, student, config.data.num_classes, load)
    except ValueError as error:
        raise ConfigError(f"method {config.method.name}: {error}") from error


def _teacher(config: TrainConfig, source: str) -> nn.Module:
    return try_out(load_teacher(source), config.data, f"the teacher {source}")


def resume(folder: Path | str) -> dict:
    """Go on with the run in `folder` from its newest usable checkpoint; the result is that of an unbroken run."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        hint = f"; its teachers were still in training: {_again(folder)}" if (folder / "teachers").is_dir() else ""
        raise ConfigError(f"cannot resume {folder}: it holds no {CONFIG}{hint}")
    return Trainer(read_config(folder / CONFIG), resume_from=folder).fit()


class Trainer:
    """One run.

    Attributes:
        step: completed optimizer steps, of `total`.
        method: the method, unwrapped; `model` is what accelerate made of it.
    """

    def __init__(self, config: TrainConfig, resume_from: Path | None = None):
        self.config = config
        cls = get_method(config.method.name)
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process may have set others
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.grad_accum,
            cpu=config.device == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=cls.find_unused_parameters)],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if self.world != int(os.environ.get("WORLD_SIZE", 1)):
            raise ConfigError(f"{os.environ['WORLD_SIZE']} processes were started, but accelerate joined {self.world}")
        torch.use_deterministic_algorithms(config.deterministic)
        seed_all(config.seed)
        self.data = build_data(config.data, config.seed, self.rank)
        self.steps_per_epoch = self.data.steps_per_epoch(config.data.batch_size, config.grad_accum, self.world)
        self.total = config.steps or config.epochs * self.steps_per_epoch
        self.description = describe(config.model, config.data)
        self._prepare(_method(config, lambda source: _teacher(config, source)))
        self.step, self.best, self.sums, self.count = 0, None, {}, 0
        self.saved: int | None = None  # step of the last checkpoint
        self.recent: list[torch.Tensor] = []
        self.names: tuple[str, ...] = ()
        self.seconds = 0.0
        self.first_step = 0
        self.folder = resume_from or claim_folder(config)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep)
        if resume_from is not None:
            self._restore()
        elif self.accelerator.is_main_process:
            save_config(config, self.folder / CONFIG)

    def _prepare(self, method) -> None:
        config = self.config
        method.to(self.accelerator.device).train()
        optimizer = make_optimizer(method, config.optim)
        self.ema = None
        if config.ema.decay:
            if self.accelerator.is_fsdp2:
                raise ConfigError("ema.decay does not go together with FSDP: the averaged copy is not sharded")
            self.ema = ModelEmaV3(method.student, decay=config.ema.decay, use_warmup=config.ema.warmup)
        if config.compile:
            method.compile()
        self.model, self.optimizer = self.accelerator.prepare(method, optimizer)
        self.method = self.accelerator.unwrap_model(self.model)
        self.scheduler = make_scheduler(self.optimizer, config.sched, self.total, self.steps_per_epoch)
        self.mixup = make_mixup(config, self.world)

    def _restore(self) -> None:
        """Load the newest checkpoint that can be read; say so where it is not the newest one there is."""
        failures = []
        for step in reversed(self.checkpoints.steps()):
            try:
                tensors, state = self.checkpoints.load(step)
                restore_state(self.accelerator, self.model, self.optimizer, tensors, state, self.checkpoints.path(step))
                if self.ema:
                    load_weights(self.ema.module, tensors["ema"], self.checkpoints.path(step) / "ema.safetensors")
            except CheckpointError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                warnings.warn(f"{failure}; going on from {self.checkpoints.path(step)}", stacklevel=2)
            self.step, self.best, self.sums, self.count = step, state["best"], state["sums"], state["count"]
            return
        if failures:
            raise CheckpointError(f"no checkpoint of {self.folder} can be used: " + "; ".join(failures))

    def fit(self) -> dict:
        """Train to the end, evaluate, and export the student.

        Raises:
            DivergedError: a loss is not finite.
            Stopped: SIGINT or SIGTERM came; a checkpoint has been written.
        """
        config, main = self.config, self.accelerator.is_main_process
        self.first_step = self.step
        self.metrics = Metrics(self.folder, self.step) if main else None
        with Screen(self.total, self.step, show=main) as self.screen, Signals() as self.signals:
            self.screen.line(f"{config.method.name} into {self.folder}: {self._summary()}")
            try:
                if self.step < self.total:
                    self._loop()
                elif (self.folder / STUDENT).is_file() and (self.folder / RESULT).is_file():
                    self.screen.line(f"finished before; its result is in {self.folder / RESULT}")
                    return json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
                return self._finish()
            finally:
                if main:
                    self.metrics.close()

    def _summary(self) -> str:
        parameters = sum(p.numel() for p in self.method.student.parameters())
        start = f", going on at step {self.step}" if self.step else ""
        devices = f"{self.world} x {self.accelerator.device.type}"
        return (
            f"{self.config.model.name} ({parameters / 1e6:.2f} M parameters), {len(self.data.train)} training and "
            f"{len(self.data.eval)} test images, {self.total} steps on {devices}{start}"
        )

    def _loop(self) -> None:
        config = self.config
        batches = self.data.train_loader(config.data, config.seed, start=self.step, stop=self.total,
                                         accumulate=config.grad_accum, rank=self.rank, world=self.world)  # fmt: skip
        clock = time.perf_counter()
        while self.step < self.total:
            self._train_step(batches)
            last = self.step == self.total
            epoch_end = last or self.step % self.steps_per_epoch == 0
            if epoch_end or self.step % config.log_every == 0 or self.signals.caught:
                self._look()
            if epoch_end:
                self.seconds += time.perf_counter() - clock
                self._end_epoch(last)
                clock = time.perf_counter()
            elif config.checkpoint.every_steps and self.step % config.checkpoint.every_steps == 0:
                self._look()
                self._checkpoint()
            if (epoch_end or self.step % config.log_every == 0 or self.world == 1) and self._stopping():
                self._look()
                path = self.checkpoints.path(self.step) if self.saved == self.step else self._checkpoint()
                name = signal.Signals(self.signals.caught or signal.SIGTERM).name
                raise Stopped(
                    f"stopped by {name} after step {self.step}; checkpoint {path}; go on with --resume {self.folder}",
                    self.signals.caught or signal.SIGTERM,
                )

    def _train_step(self, batches) -> None:
        """One optimizer step. Its random numbers depend on (seed, step, micro-batch, process)."""
        config, accelerator = self.config, self.accelerator
        self.scheduler.step_update(self.step)
        parts = None
        for micro in range(config.grad_accum):
            images, targets = send_to_device(next(batches), accelerator.device, non_blocking=True)
            seed_all(config.seed, STEP, self.step, micro, self.rank)
            if self.mixup:
                images, targets = self.mixup(images, targets)
            with accelerator.accumulate(self.model):
                losses = self.model(images, targets, self.step / self.total)
                self.method.backward(losses, accelerator)
                if accelerator.sync_gradients and config.clip_grad is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if tuple(losses) != self.names:
                self._look()
                self.names = tuple(losses)
            values = torch.stack([loss.detach().double() for loss in losses.values()]) / config.grad_accum
            parts = values if parts is None else parts + values
        self.recent.append(parts)
        self.step += 1
        if self.ema:
            self.ema.update(self.method.student, step=self.step)

    def _look(self) -> None:
        """Read the losses since the last look, averaged over processes; stop where one is not finite."""
        if not self.recent:
            return
        table = self.accelerator.reduce(torch.stack(self.recent), reduction="mean").tolist()
        first = self.step - len(table)
        self.recent = []
        for offset, values in enumerate(table):
            if not all(map(math.isfinite, values)):
                self._diverged(first + offset + 1, dict(zip(self.names, values, strict=True)))
            for name, value in zip(self.names, values, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += len(table)
        self.screen.step(self.step, sum(table[-1]))
        if self.metrics:
            row = {f"step/{name}": value for name, value in zip(self.names, table[-1], strict=True)}
            self.metrics.scalars(row | {"step/lr": self.optimizer.param_groups[0]["lr"]}, self.step)

    def _diverged(self, step: int, losses: dict[str, float]) -> None:
        steps = self.checkpoints.steps()
        good = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
        )
        values = ", ".join(f"{name}={value}" for name, value in losses.items())
        raise DivergedError(
            f"method {self.config.method.name}: the loss of step {step} is not finite ({values}); {good}"
        )

    def _stopping(self) -> bool:
        if self.world == 1:
            return self.signals.caught is not None
        flag = torch.tensor(float(self.signals.caught is not None), device=self.accelerator.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    def _end_epoch(self, last: bool) -> None:
        config = self.config
        epoch = math.ceil(self.step / self.steps_per_epoch)
        row = {"step": self.step, "epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {f"train/{name}": value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        improved = False
        if last or epoch % config.eval_every == 0:
            row |= self._evaluate()
            score = row.get("ema/top1", row["eval/top1"])
            improved = self.best is None or score > self.best["top1"]
            if improved:
                self.best = {"step": self.step, "epoch": epoch, "top1": score}
        if "eval/top1" in row:
            self.screen.row(row)
        if self.metrics:
            self.metrics.add(row)
        every = config.checkpoint.every_epochs
        if last or improved or (every and epoch % every == 0):
            self._checkpoint()

    def _evaluate(self) -> dict[str, float]:
        self.method.eval()
        models = {"eval": self.method} | ({"ema": self.ema.module} if self.ema else {})
        row = {}
        for prefix, model in models.items():
            loader, valid = self.data.eval_loader(self.config.data, self.rank, self.world)
            scores = evaluate(model, loader, self.accelerator, valid)
            row |= {f"{prefix}/{name}": value for name, value in scores.items()}
        if self.accelerator.is_fsdp2:
            self.method.reshard()  # the root's weights stay whole after a forward pass without a backward pass
        self.method.train()
        return row

    def _checkpoint(self) -> Path:
        tensors, state = gather_state(self.accelerator, self.model, self.optimizer)
        path = self.checkpoints.path(self.step)
        if self.accelerator.is_main_process:
            if self.ema:
                tensors["ema"] = self.ema.module.state_dict()
            state |= {"best": self.best, "sums": self.sums, "count": self.count}
            self.checkpoints.save(self.step, tensors, state, self.best and self.best["step"])
        self.saved = self.step
        self.accelerator.wait_for_everyone()
        return path

    def _finish(self) -> dict:
        """Export the student, with the averaged weights where there are any, and write result.json."""
        row = self._evaluate()
        weights = self._export()
        steps = max(self.step - self.first_step, 1)
        result = {
            "method": self.config.method.name, "model": self.config.model.name, "folder": str(self.folder),
            "step": self.step, "best": self.best, **row, "top1": row.get("ema/top1", row["eval/top1"]),
            "seconds": self.seconds, "seconds_per_step": self.seconds / steps,
            "images_per_second": steps * self.config.data.batch_size / max(self.seconds, 1e-9),
            "parameters": sum(p.numel() for p in self.method.student.parameters()), "processes": self.world,
            "torch": torch.__version__, "timm": timm.__version__,
        }  # fmt: skip
        if self.accelerator.is_main_process:
            save_student(self.folder / STUDENT, weights, self.description)
            write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n")
            self.screen.line(f"top-1 {result['top1']:.2f} %; student in {self.folder / STUDENT}")
        self.accelerator.wait_for_everyone()
        return result

    def _export(self) -> dict[str, torch.Tensor]:
        if self.ema:
            self.method.student.load_state_dict(self.ema.module.state_dict())
        return gather_weights(self.method.export())
