"""Runs of bootstrap: they resume, two processes align the gradients of both, shared tensors are stored once."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from fastib.train.build import load_student
from fastib.train.config import save_config
from fastib.train.loop import Trainer, resume, train

BOOTSTRAP = ("model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}", "method.form=base")


@pytest.fixture
def bootstrap(tiny):
    """``bootstrap("epochs=1", output="name")``: a tiny run of bootstrap."""
    return lambda *overrides, **options: tiny(*BOOTSTRAP, *overrides, method="bootstrap", **options)


@pytest.mark.parametrize("shared", ["true", "false"])
def test_a_killed_run_resumes_to_that_of_an_unbroken_one(bootstrap, scenario, tmp_path, shared):
    settings = ("epochs=2", f"method.shared={shared}", "grad_accum=2", "clip_grad=1.0", "checkpoint.every_steps=3")
    train(bootstrap(*settings, output="whole"))
    save_config(bootstrap(*settings, output="broken"), tmp_path / "broken.yaml")
    assert scenario("kill_in_step", tmp_path / "broken.yaml", 7).returncode == -signal.SIGKILL
    resume(tmp_path / "broken")
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "broken/metrics.csv").read_text()
    whole, broken = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(weight.equal(broken[name]) for name, weight in whole.items())


def test_shared_tensors_are_stored_once(bootstrap, tmp_path):
    sizes = {}
    for shared in ("true", "false"):
        train(bootstrap("epochs=1", f"method.shared={shared}", output=shared))
        checkpoint = sorted((tmp_path / shared / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
        sizes[shared] = {name: t.shape for name, t in load_file(checkpoint).items()}
    assert {n for n in sizes["true"] if n.startswith("student.")} == {
        n for n in sizes["false"] if n.startswith("student.")
    }
    assert {n for n in sizes["false"] if n not in sizes["true"]} == {
        f"agent.blocks.{i}.{part}.{kind}"
        for i in range(2) for part in ("conv", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
    }  # fmt: skip
    student = load_student(tmp_path / "true/student.safetensors")
    assert not any("agent" in name for name in student.state_dict())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("align", ["tensor", "all"])
def test_two_processes_align_the_gradients_of_both(bootstrap, tmp_path, scenario, first_gradients, freeze_norms, align):
    """Reduced before they are aligned, clipped after: one process's gradients of the whole batch, norms aside."""
    settings = ("epochs=1", "steps=1", "grad_accum=2", f"method.align={align}", "method.shared=true",
                "data.eval_batch_size=100", "optim.opt=sgd", "optim.lr=0.1")  # fmt: skip
    save_config(bootstrap(*settings, "clip_grad=0.5", output="two"), tmp_path / "two.yaml")
    done = scenario("frozen_norms", tmp_path / "two.yaml", tmp_path / "two.safetensors", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    trainer = Trainer(bootstrap(*settings, output="one"))
    freeze_norms(trainer)
    whole = first_gradients(trainer)
    trainer.fit()
    norm = torch.stack([gradient.double().norm() for gradient in whole.values()]).norm()
    assert norm > 1.0
    found = load_file(tmp_path / "two.safetensors")
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        expected = (gradient.double() * 0.5 / norm).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5, msg=name)
