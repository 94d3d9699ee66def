"""Runs of DHVT: they resume, and their head tokens are drawn from the command line."""

import signal

import pytest
from safetensors.torch import load_file

from fastib.train.cli import main
from fastib.train.config import save_config
from fastib.train.errors import ConfigError
from fastib.train.loop import resume, train

DHVT = ("model.name=dhvt_tiny_patch4_32", "model.kwargs={embed_dim: 16, depth: 2, num_heads: 2, drop_path_rate: 0.1}")


@pytest.fixture
def heads(tiny):
    """``heads("epochs=1", output="name")``: a tiny run of DHVT."""
    return lambda *overrides, **options: tiny(*DHVT, *overrides, method="dhvt", **options)


def test_head_tokens_are_analyzed(heads, tmp_path, capsys):
    train(heads("epochs=1"))
    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["analyze", "head-tokens", str(run), "layer=1", "count=3"]) == 0
    out = capsys.readouterr().out
    assert "attention of the head tokens, layer 1, mean of the heads, 3 images" in out
    assert all(f"head token {i}" in out for i in (1, 2)) and f"wrote {run}/analysis/head_tokens.png" in out
    assert (run / "analysis/head_tokens.png").read_bytes().startswith(b"\x89PNG")
    for words, message in ((["layer=3"], "layer: expected a number in [1, 2], got 3"),
                           (["layer=true"], "layer: expected a number, got True"),
                           (["count=true"], "count: expected a number of at least 1, got True"),
                           (["student=1"], "unknown key student; known keys: layer, count, head")):  # fmt: skip
        assert main(["analyze", "head-tokens", str(run), *words]) == 1
        assert message in capsys.readouterr().err


def test_a_killed_run_ends_as_an_unbroken_one(heads, scenario, tmp_path):
    """Running statistics of BatchNorm included."""
    settings = ("checkpoint.every_steps=3", "data.augment.mixup=0.2", "epochs=2")
    train(heads(*settings, output="unbroken"))
    save_config(heads(*settings, output="broken"), tmp_path / "recipe.yaml")
    assert scenario("kill_in_step", tmp_path / "recipe.yaml", 5).returncode == -signal.SIGKILL
    resume(tmp_path / "broken")
    ours, theirs = (tmp_path / name / "checkpoints/step-00000008/model.safetensors" for name in ("broken", "unbroken"))
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys() and "student.blocks.0.mlp.norm2.running_var" in ours
    assert all(value.equal(theirs[key]) for key, value in ours.items())


def test_another_student_is_refused(tiny):
    with pytest.raises(ConfigError, match="method dhvt: student: expected a model with head tokens"):
        train(tiny(method="dhvt"))
