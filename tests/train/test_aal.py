"""Runs of AAL: they resume, the next run can take their links, and the student leaves without any."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from fastib.methods.links import read_mask
from fastib.train.build import load_student
from fastib.train.cli import main
from fastib.train.config import save_config
from fastib.train.errors import ConfigError
from fastib.train.loop import resume, train
from fastib.train.metrics import read_metrics

AAL = ("model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}", "method.teacher=own:cnn",
       "teachers.cnn.recipe=teacher/digits", "teachers.cnn.options=[steps=1]")  # fmt: skip


@pytest.fixture
def linked(tiny):
    """``linked("epochs=1", output="name")``: a tiny run of AAL that trains its teacher for one step."""
    return lambda *overrides, **options: tiny(*AAL, *overrides, method="aal", **options)


def test_links_are_analyzed_and_taken_by_the_next_run(linked, tmp_path, capsys):
    train(linked("epochs=2"))
    run = tmp_path / "run"
    state = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    weight = state["groups.0.link.weight"].double().abs()
    assert weight.shape == (16 + 32 + 64, 2 * 2)
    magnitude = (weight - weight.min()) / (weight.max() - weight.min())
    levels = magnitude.split([16, 32, 64])
    strength = torch.stack([torch.stack([part[:, :2].mean(), part[:, 2:].mean()]) for part in levels])
    threshold = strength.flatten().sort().values[2:4].mean().item()  # three of six are above it
    capsys.readouterr()
    assert main(["analyze", "links", str(run), f"threshold={threshold}"]) == 0
    out = capsys.readouterr().out
    mask = read_mask(run / "analysis/links.safetensors")
    kept = strength > threshold
    assert mask.equal(kept.repeat_interleave(torch.tensor([16, 32, 64]), 0).repeat_interleave(2, 1))
    for level, row in enumerate(strength.tolist(), 1):
        line = next(line for line in out.splitlines() if f"CNN level {level}" in line)
        assert all(f"{value:.3f}".rstrip("0") in line for value in row)
    assert f"{int(mask.sum())} of 448 links kept; train with method.links={run}/analysis/links.safetensors" in out
    assert (run / "analysis/links.png").read_bytes().startswith(b"\x89PNG")

    train(linked("epochs=1", f"method.links={run}/analysis/links.safetensors", f"method.teacher=run:{run}/teachers/cnn",
                 output="next"))  # fmt: skip
    state = load_file(sorted((tmp_path / "next/checkpoints").glob("step-*"))[-1] / "model.safetensors")
    rows = mask.any(1)
    assert state["groups.0.channels"].equal(rows.nonzero()[:, 0])
    if not mask[rows].all():
        assert state["groups.0.link.mask"].equal(mask[rows])
    capsys.readouterr()
    assert main(["analyze", "links", str(tmp_path / "next")]) == 0
    assert f"of {int(mask.sum())} links kept" in capsys.readouterr().out


def test_the_student_leaves_without_links(linked, tmp_path):
    result = train(linked("epochs=1"))
    tensors = load_file(tmp_path / "run/student.safetensors")
    plain = load_student(tmp_path / "run/student.safetensors")
    assert tensors.keys() == plain.state_dict().keys()
    assert result["parameters"] == sum(p.numel() for p in plain.parameters())
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert "train/attention" in rows[0] and "train/ce" in rows[0]


def test_a_killed_run_ends_as_an_unbroken_one(linked, scenario, tmp_path):
    settings = ("checkpoint.every_steps=3", "data.augment.mixup=0.2", "epochs=2")
    train(linked(*settings, output="unbroken"))
    teacher = f"method.teacher=run:{tmp_path}/unbroken/teachers/cnn"
    save_config(linked(*settings, teacher, output="broken"), tmp_path / "recipe.yaml")
    assert scenario("kill_in_step", tmp_path / "recipe.yaml", 5).returncode == -signal.SIGKILL
    resume(tmp_path / "broken")
    ours, theirs = (tmp_path / name / "checkpoints/step-00000008/model.safetensors" for name in ("broken", "unbroken"))
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys() and "groups.0.link.weight" in ours
    assert all(value.equal(theirs[key]) for key, value in ours.items())
    assert (tmp_path / "broken/metrics.csv").read_text() == (tmp_path / "unbroken/metrics.csv").read_text()


@pytest.mark.slow
def test_two_processes_and_accumulation_give_the_gradients_of_one(linked, scenario, tmp_path):
    train(linked("steps=1", output="first"))
    teacher = f"method.teacher=run:{tmp_path}/first/teachers/cnn"
    found = {}
    for name, processes in (("one", 1), ("two", 2)):
        save_config(linked("steps=1", teacher, output=name), tmp_path / f"{name}.yaml")
        done = scenario("gradients", tmp_path / f"{name}.yaml", tmp_path / f"{name}.safetensors", processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_file(tmp_path / f"{name}.safetensors")
    assert found["one"].keys() == found["two"].keys()
    for name, value in found["one"].items():
        torch.testing.assert_close(found["two"][name], value, rtol=1e-3, atol=1e-5 * value.abs().max().item() + 1e-8)


@pytest.mark.slow
def test_sharded_training_computes_the_same(linked, scenario, tmp_path):
    train(linked("steps=1", output="first"))
    settings = ("epochs=1", f"method.teacher=run:{tmp_path}/first/teachers/cnn")
    save_config(linked(*settings, output="two"), tmp_path / "two.yaml")
    done = scenario("sharded", tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    train(linked(*settings, output="one"))
    for two, one in zip(*(read_metrics(tmp_path / f"{n}/metrics.csv") for n in ("two", "one")), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    files = (tmp_path / name / "checkpoints/step-00000004/model.safetensors" for name in ("two", "one"))
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["groups.0.link.weight"], theirs["groups.0.link.weight"], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["links", "gone"], "cannot read gone/config.yaml"),
        (["heads", "RUN"], "method 'plain' has no analysis 'heads'; it has: none"),
    ],
)
def test_errors_of_analyze(arguments, message, tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_config(tiny(), tmp_path / "run/config.yaml")
    assert main(["analyze", *(str(tmp_path / "run") if word == "RUN" else word for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_errors_of_analyze_links(linked, tmp_path, capsys):
    run = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    save_config(linked(), tmp_path / "run/config.yaml")
    assert main(["analyze", "links", run]) == 1
    assert "has no checkpoint to analyze" in capsys.readouterr().err
    (tmp_path / "run/config.yaml").unlink()
    train(linked("steps=1"))
    cases = {
        "thresh=1": "unknown key thresh; known keys: threshold",
        "threshold=2": "threshold: expected",
        "threshold=much": "threshold: expected",
        "threshold": "threshold: expected",
    }
    for word, message in cases.items():
        assert main(["analyze", "links", run, word]) == 1
        assert message in capsys.readouterr().err


def test_wrong_options_are_errors_of_the_method(linked):
    with pytest.raises(ConfigError, match=r"method aal: links: alpha is for 7 levels of a CNN and 12 layers"):
        train(linked("method.links=alpha"))
