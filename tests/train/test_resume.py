"""A run that was killed and resumed ends as one that was not, bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastib.train import checkpoint
from fastib.train.checkpoint import Checkpoints, write_tensors
from fastib.train.config import save_config
from fastib.train.errors import CheckpointError, ConfigError, Stopped
from fastib.train.loop import resume, train

SETTINGS = ("checkpoint.every_steps=3", "grad_accum=2", "ema.decay=0.9", "data.augment.mixup=0.2",
            "model.kwargs.proj_drop_rate=0.1")  # fmt: skip


def same(run: Path, unbroken: Path) -> None:
    """Metrics, weights and the whole last checkpoint are equal."""
    assert (run / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    files = ["student.safetensors"] + [
        f"checkpoints/step-00000012/{n}.safetensors" for n in ("model", "optimizer", "ema")
    ]
    for name in files:
        ours, theirs = load_file(run / name), load_file(unbroken / name)
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) for key, value in ours.items()), name


@pytest.fixture
def recipe(tiny, tmp_path):
    """The file of a configuration whose run goes to tmp_path/broken."""
    save_config(tiny(*SETTINGS, output="broken"), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.fixture
def unbroken(tiny, tmp_path):
    train(tiny(*SETTINGS, output="unbroken"))
    return tmp_path / "unbroken"


def test_kill_in_the_middle_of_an_epoch(scenario, recipe, unbroken, tmp_path):
    # checkpoints at 3, 4 (end of epoch 1), 6; the rows up to step 4 are written
    assert scenario("kill_in_step", recipe, 7).returncode == -signal.SIGKILL
    broken = tmp_path / "broken"
    assert Checkpoints(broken / "checkpoints").steps()[-1] == 6
    assert not (broken / "student.safetensors").exists()
    resume(broken)
    same(broken, unbroken)


def test_kill_in_the_middle_of_a_checkpoint(scenario, recipe, unbroken, tmp_path):
    # the 11th file is the optimizer of step 8, the end of epoch 2, whose row is in metrics.csv already
    assert scenario("kill_in_checkpoint", recipe, 11).returncode == -signal.SIGKILL
    broken = tmp_path / "broken"
    assert (broken / "checkpoints" / ".tmp").is_dir()
    assert Checkpoints(broken / "checkpoints").steps()[-1] == 6
    assert "\n8,2," in (broken / "metrics.csv").read_text()
    resume(broken)
    same(broken, unbroken)
    assert not list((broken / "checkpoints").glob(".*"))


def test_sigterm_writes_a_checkpoint_and_resume_goes_on(scenario, recipe, unbroken, tmp_path):
    done = scenario("terminate_in_step", recipe, 4)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM after step 5" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    resume(tmp_path / "broken")
    same(tmp_path / "broken", unbroken)


def test_damaged_checkpoints_fall_back_to_the_one_before(unbroken):
    last, before = unbroken / "checkpoints/step-00000012", unbroken / "checkpoints/step-00000009"
    weights, table = load_file(unbroken / "student.safetensors"), (unbroken / "metrics.csv").read_text()
    data = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"step-00000012/model\.safetensors.*truncated.*going on from .*step-00000009"):
        resume(unbroken)
    again = load_file(unbroken / "student.safetensors")
    assert all(value.equal(again[key]) for key, value in weights.items())
    assert (unbroken / "metrics.csv").read_text() == table

    write_tensors(last / "model.safetensors", {"weight": weights["norm.weight"]})
    (before / "state.json").write_text('{"format": "something else"}')
    with pytest.raises(CheckpointError, match=r"step-00000012 does not belong.*step-00000009/state\.json is not"):
        resume(unbroken)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        resume(tmp_path)


def test_a_finished_run_resumes_to_its_own_result(unbroken):
    table = (unbroken / "metrics.csv").read_text()
    before = json.loads((unbroken / "result.json").read_text())
    assert before["step"] == 12 and before["seconds"] > 0
    assert resume(unbroken) == before == json.loads((unbroken / "result.json").read_text())
    (unbroken / "student.safetensors").unlink()
    assert resume(unbroken)["top1"] == before["top1"]
    assert (unbroken / "student.safetensors").is_file()
    assert (unbroken / "metrics.csv").read_text() == table


def test_a_checkpoint_is_not_replaced_by_itself(tiny, tmp_path, monkeypatch):
    """Stopped at the end of an epoch: a kill while the same step is written again would leave none with keep=1."""
    saved, original = [], Checkpoints.save

    def save(self, step, *rest):
        if not saved:
            os.kill(os.getpid(), signal.SIGTERM)
        saved.append(step)
        return original(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 4; checkpoint .*step-00000004"):
        train(tiny("checkpoint.keep=1"))
    assert saved == [4]


def test_a_configuration_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match="no space left"):
        save_config(tiny(), tmp_path / "config.yaml")
    assert not (tmp_path / "config.yaml").exists()
