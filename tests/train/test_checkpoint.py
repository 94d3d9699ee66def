"""Tensor files, optimizer states, and which checkpoints stay."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2

import fastib
from fastib.train import checkpoint
from fastib.train.checkpoint import Checkpoints, flatten_optimizer, read_tensors, unflatten_optimizer, write_tensors
from fastib.train.errors import CheckpointError


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"a": base, "view": base[1:3, ::2], "t": base.t(), "half": base.bfloat16(), "int": torch.arange(3),
               "scalar": torch.tensor(float("inf")), "empty": torch.empty(0, 3)}  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors, {"note": "text"})
    back, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata["note"] == "text"
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].equal(value)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "adafactor", "lion", "muon", "adopt"])
def test_an_optimizer_goes_on_from_its_file(opt, tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
        return model, create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.05)

    def run(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = make()
    run(whole, optimizer, range(6))
    half, optimizer = make()
    run(half, optimizer, range(3))
    tensors, rest = flatten_optimizer(optimizer.state_dict())
    Checkpoints(tmp_path).save(3, {"model": half.state_dict(), "optimizer": tensors}, {"optimizer": rest}, None)
    loaded, state = Checkpoints(tmp_path).load(3)
    again, optimizer = make()
    again.load_state_dict(loaded["model"])
    optimizer.load_state_dict(unflatten_optimizer(loaded["optimizer"], state["optimizer"]))
    run(again, optimizer, range(3, 6))
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert ours.equal(theirs)


def test_the_newest_and_the_best_stay(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        store.save(step, {"model": {"w": torch.tensor(step)}}, {}, best=2 if step >= 2 else None)
    assert store.steps() == [2, 5, 6]
    assert store.load(2)[0]["model"]["w"] == 2
    store.save(5, {"model": {"w": torch.tensor(50)}}, {}, best=2)
    assert store.steps() == [2, 5], "a checkpoint of a later step belongs to an abandoned continuation"
    assert store.load(5)[0]["model"]["w"] == 50


def test_unusable_files_are_named(tmp_path):
    store = Checkpoints(tmp_path)
    path = store.save(1, {"model": {"w": torch.randn(100)}}, {}, None)
    file, whole = path / "model.safetensors", (path / "model.safetensors").read_bytes()
    for content in (b"", whole[:5], whole[:-1], whole[: len(whole) // 2], b"PK\x03\x04" + whole, b"\x80\x04}."):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot read .*step-00000001/model\.safetensors"):
            store.load(1)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        store.load(1)
    file.write_bytes(whole)
    store.load(1)
    state = path / "state.json"
    text = state.read_text()
    for content, message in (
        (text[:10], "cannot read"),
        ("[]", "is not the state of a fastib checkpoint"),
        ('{"format": "pytorch"}', "is not the state of a fastib checkpoint"),
        (text.replace('"version": 1, ', ""), "is not the state of a fastib checkpoint"),
        (text.replace('"version": 1', '"version": 99'), "has version 99"),
        (text.replace('"step": 1', '"step": 8'), "is of step 8, not of step 1"),
    ):
        state.write_text(content)
        with pytest.raises(CheckpointError, match=rf"state\.json.*{message}|{message}.*state\.json"):
            store.load(1)


def test_two_processes_write_one_file(tmp_path):
    program = (
        "import pathlib, sys; from fastib.train.checkpoint import write_text\n"
        "for _ in range(300): write_text(pathlib.Path(sys.argv[1]), sys.argv[2] * 1000)"
    )
    path = tmp_path / "scores.md"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, path, letter], stderr=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.md"]


def test_nothing_is_pickled():
    for path in Path(fastib.__file__).parent.joinpath("train").glob("*.py"):
        text = path.read_text()
        words = ["pickle.load", "pickle.dump", "torch.save(", "torch.load(", "joblib", "np.load("]
        if path.name != "cifar.py":  # whose unpickler calls nothing but its own stand-ins; see test_cifar.py
            words.append("import pickle")
        for word in words:
            assert word not in text, f"{path} uses {word}"


def test_a_full_disk_leaves_the_checkpoints_there_are(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save(1, {"model": {"w": torch.tensor(1)}}, {}, None)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.safetensors: No space left on device"):
        store.save(2, {"model": {"w": torch.tensor(2)}}, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert store.load(1)[0]["model"]["w"] == 1
