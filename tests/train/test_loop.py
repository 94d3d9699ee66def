"""The loop by numbers: gradients, averages, schedules, precision, and how it ends."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file

from fastib.methods import Method, get_method
from fastib.methods.base import _METHODS
from fastib.train.build import load_student
from fastib.train.cli import main
from fastib.train.data import build_data
from fastib.train.errors import ConfigError, DivergedError
from fastib.train.evaluate import evaluate_run
from fastib.train.loop import Trainer, train
from fastib.train.metrics import read_metrics


@pytest.fixture
def method(monkeypatch):
    """``method(cls)`` registers a method class under its name for the length of a test."""
    return lambda cls: monkeypatch.setitem(_METHODS, cls.__name__.lower(), cls)


def losses_of(folder):
    return [row["train/ce"] for row in read_metrics(folder / "metrics.csv")]


def test_a_run_learns_and_leaves_everything_behind(tiny, tmp_path):
    result = train(tiny("epochs=12", "data.train_fraction=0.5", "eval_every=4"))
    run = tmp_path / "run"
    losses = losses_of(run)
    assert losses[-1] < 0.8 * losses[0]
    assert result["top1"] > 30
    assert json.loads((run / "result.json").read_text()) == result
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("events.out.tfevents*"))
    rows = read_metrics(run / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert ["eval/top1" in row for row in rows] == [False, False, False, True] * 3
    assert result["eval/top1"] == rows[-1]["eval/top1"]

    config = tiny("data.train_fraction=0.5", output="other")
    data = build_data(config.data)
    images, labels = data.eval.__getitems__([(0, i, i) for i in range(360)])
    with torch.no_grad():
        logits = load_student(run / "student.safetensors").eval()(images)
    right = (logits.argmax(1) == labels).sum().item()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    scores = evaluate_run(run)
    assert scores["top1"] == result["top1"] == 100 * right / 360
    assert scores["top5"] == 100 * top5 / 360
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(tiny, first_gradients):
    found = {}
    for parts in (1, 4):
        trainer = Trainer(tiny(f"grad_accum={parts}", "steps=1", "clip_grad=1e9", output=f"run{parts}"))
        gradients = first_gradients(trainer)
        trainer.fit()
        found[parts] = gradients
    assert found[1].keys() == found[4].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[4][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_gradients_are_clipped_to_the_norm(tiny, first_gradients):
    trainer = Trainer(tiny("steps=1", "clip_grad=0.01"))
    gradients = first_gradients(trainer)
    trainer.fit()
    assert math.sqrt(sum(g.square().sum().item() for g in gradients.values())) == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tiny):
    settings = ("steps=20", "sched.warmup_epochs=1", "sched.warmup_lr=0.001", "sched.min_lr=0.0001", "optim.lr=0.01")
    trainer = Trainer(tiny(*settings, "sched.cooldown_epochs=1"))
    rates = []
    for step in range(20):
        trainer.scheduler.step_update(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    warm = [0.001 + 0.009 * t / 4 for t in range(4)]
    cosine = [0.0001 + 0.0099 * (1 + math.cos(math.pi * t / 16)) / 2 for t in range(4, 16)]
    assert rates == pytest.approx(warm + cosine + 4 * [0.0001])


def test_the_average_of_the_weights_is_the_recursion(tiny):
    decay, trainer = 0.7, Trainer(tiny("steps=5", "ema.decay=0.7"))
    history = []
    update = trainer.ema.update
    trainer.ema.update = lambda model, step: (history.append(model.head.weight.detach().double()), update(model, step))
    trainer.fit()
    expected = history[0]
    for weight in history[1:]:
        expected = decay * expected + (1 - decay) * weight
    exported = load_file(trainer.folder / "student.safetensors")["head.weight"]
    torch.testing.assert_close(exported.double(), expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_autocast_learns(tiny, tmp_path):
    train(tiny("precision=bf16", "epochs=8"))
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.97 * losses[0]
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "run" / "student.safetensors").values())


def test_autocast_reaches_the_losses(tiny, method):
    seen = []

    class Spy(get_method("plain")):
        def losses(self, images, targets, progress):
            seen.append((self.student(images).dtype, progress))
            return super().losses(images, targets, progress)

    method(Spy)
    train(tiny("precision=bf16", "steps=4", method="spy"))
    assert seen == [(torch.bfloat16, i / 4) for i in range(4)]


def test_a_second_stage_may_have_other_losses(tiny, tmp_path, method):
    class Stages(get_method("plain")):
        def losses(self, images, targets, progress):
            loss = super().losses(images, targets, progress)["ce"]
            return {"ce": loss} if progress >= 0.4 else {"first": 0.25 * loss, "ce": 0.75 * loss}

    method(Stages)
    train(tiny("steps=10", method="stages", output="stages"))
    train(tiny("steps=10", output="plain"))
    stages, plain = (read_metrics(tmp_path / name / "metrics.csv") for name in ("stages", "plain"))
    assert [("train/first" in row) for row in stages] == [True, False, False]
    for ours, theirs in zip(stages, plain, strict=True):
        assert ours["train/ce"] + ours.get("train/first", 0) == pytest.approx(theirs["train/ce"], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, tiny, method, tmp_path, capsys):
    class Bad(get_method("plain")):
        def losses(self, images, targets, progress):
            losses = super().losses(images, targets, progress)
            return losses if progress < 0.5 else losses | {"odd": losses["ce"] * value}

    method(Bad)
    expected = rf"loss of step 7 is not finite \(ce=\d.*, odd={value}\); the last good checkpoint is .*step-00000004$"
    with pytest.raises(DivergedError, match=expected):
        train(tiny("steps=12", method="bad"))
    assert (tmp_path / "run" / "curves.png").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((tmp_path / "run" / "config.yaml").read_text().replace("/run\n", "/again\n"))
    assert main(["train", "bad", "--recipe", str(recipe)]) == 1
    assert "method bad: the loss of step 7 is not finite" in capsys.readouterr().err


def test_mixed_targets_reach_the_method_as_probabilities(tiny, method):
    seen = []

    class Spy(get_method("plain")):
        def losses(self, images, targets, progress):
            seen.append(targets)
            return super().losses(images, targets, progress)

    method(Spy)
    train(tiny("steps=2", "data.augment.smoothing=0.2", method="spy", output="smooth"))
    assert all(t.shape == (64, 10) for t in seen)
    top = seen[0].max(dim=1)
    torch.testing.assert_close(top.values, torch.full((64,), 0.82))
    torch.testing.assert_close(seen[0].sum(1), torch.ones(64))
    seen.clear()
    train(tiny("steps=2", "data.augment.mixup=0.8", "data.augment.cutmix=1.0", method="spy", output="mixed"))
    assert ((seen[0] > 0).sum(1) == 2).any()
    with pytest.raises(ConfigError, match="even number of images"):
        Trainer(tiny("data.batch_size=63", "data.augment.mixup=0.8", output="odd"))


def test_training_only_parts_learn_and_are_not_exported(tiny, method):
    class Parts(get_method("plain")):
        def __init__(self, options, student, num_classes, load_teacher):
            super().__init__(options, student, num_classes, load_teacher)
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.freeze("teacher", torch.nn.BatchNorm1d(3))

        def losses(self, images, targets, progress):
            assert not self.frozen["teacher"].training
            return {"ce": torch.nn.functional.cross_entropy(self.scale * self.student(images), targets)}

    method(Parts)
    trainer = Trainer(tiny("steps=3", method="parts"))
    assert not any("teacher" in name or "running" in name for name in trainer.method.state_dict())
    trainer.fit()
    assert trainer.method.scale.item() != 1
    saved = load_file(trainer.checkpoints.path(3) / "model.safetensors")
    assert saved["scale"].item() == trainer.method.scale.item()
    assert "scale" not in load_file(trainer.folder / "student.safetensors")


def test_frozen_parts_move_with_the_method():
    method = Method(None, torch.nn.Linear(2, 2), 2, None)
    method.freeze("teacher", torch.nn.Linear(2, 2))
    method.to(torch.float64).train()
    assert method.frozen["teacher"].weight.dtype == torch.float64
    assert not method.frozen["teacher"].weight.requires_grad
    assert len(list(method.parameters())) == 2


def test_the_students_own_list_decides_about_weight_decay(tiny):
    trainer = Trainer(tiny())
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in trainer.optimizer.param_groups}
    student = trainer.method.student
    assert id(student.pos_embed) in groups[0.0]
    assert id(student.blocks[0].norm1.weight) in groups[0.0]
    assert id(student.blocks[0].mlp.fc1.weight) in groups[0.05]


def test_compiled_training_computes_the_same(tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(Method, "compile", lambda self: compiled.append(compile_eager(self)))
    train(tiny("steps=3", "compile=true", output="compiled"))
    train(tiny("steps=3", output="plain"))
    assert compiled
    ours, theirs = (load_file(tmp_path / name / "student.safetensors") for name in ("compiled", "plain"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def compile_eager(method):
    """Graph capture without a C++ compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.Module.compile(method, backend="aot_eager")


def test_runs_do_not_overwrite_each_other(tiny, tmp_path, monkeypatch):
    train(tiny("steps=1"))
    with pytest.raises(ConfigError, match=r"run already holds a run: go on with --resume"):
        train(tiny("steps=1"))
    monkeypatch.chdir(tmp_path)
    config = tiny("steps=1")
    for number in (1, 2):
        config.output = None
        assert train(config)["folder"] == f"runs/plain-digits-00{number}"
