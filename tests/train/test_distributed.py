"""Two processes under torchrun (gloo) compute what one computes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastib.train.config import save_config
from fastib.train.loop import Trainer, train
from fastib.train.metrics import read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


def test_two_processes_give_the_gradients_of_one(tiny, tmp_path, scenario, first_gradients):
    settings = ("epochs=2", "grad_accum=2", "data.eval_batch_size=100", "optim.opt=sgd", "optim.lr=0.1")
    save_config(tiny(*settings, output="two"), tmp_path / "two.yaml")
    done = scenario("gradients", tmp_path / "two.yaml", tmp_path / "two.safetensors", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 x cpu" in done.stdout

    trainer = Trainer(tiny(*settings, output="one"))
    expected = first_gradients(trainer)
    trainer.fit()
    found = load_file(tmp_path / "two.safetensors")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    ours, theirs = load_file(tmp_path / "two/student.safetensors"), load_file(tmp_path / "one/student.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    for two, one in zip(*(read_metrics(tmp_path / f"{n}/metrics.csv") for n in ("two", "one")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_sharded_training_and_its_checkpoints_compute_the_same(tiny, tmp_path, scenario):
    settings = ("epochs=2", "grad_accum=2", "clip_grad=1.0")
    save_config(tiny(*settings, output="two"), tmp_path / "two.yaml")
    done = scenario("sharded", tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    train(tiny(*settings, output="one"))
    table = (tmp_path / "two/metrics.csv").read_text()
    for two, one in zip(*(read_metrics(tmp_path / f"{n}/metrics.csv") for n in ("two", "one")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    ours, theirs = load_file(tmp_path / "two/student.safetensors"), load_file(tmp_path / "one/student.safetensors")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=1e-4, msg=name)

    shutil.rmtree(tmp_path / "two/checkpoints/step-00000008")
    done = scenario("sharded", tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on at step 4" in done.stdout
    assert (tmp_path / "two/metrics.csv").read_text() == table
    again = load_file(tmp_path / "two/student.safetensors")
    assert all(value.equal(again[name]) for name, value in ours.items())
