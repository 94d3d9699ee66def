"""Where teachers come from, and what is refused."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastib.train.build import build_model, load_student, load_teacher, save_student
from fastib.train.errors import CheckpointError, ConfigError
from fastib.train.loop import train

SPEC = {"name": "resnet18", "kwargs": {"channels": [8, 8, 8, 16]}, "num_classes": 4, "in_chans": 1, "img_size": 16}


@pytest.fixture
def run(tmp_path):
    model = build_model(**SPEC)
    save_student(tmp_path / "student.safetensors", model.state_dict(), SPEC)
    return tmp_path, model.eval()


def test_a_run_and_its_file_give_the_same_frozen_teacher(run):
    folder, model = run
    images = torch.randn(2, 1, 16, 16)
    for source in (f"run:{folder}", str(folder / "student.safetensors")):
        teacher = load_teacher(source)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        assert teacher(images).equal(model(images))


def test_timm_weights_come_from_a_local_file(tmp_path):
    model = timm.create_model("resnet10t").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_teacher(f"timm:resnet10t@{tmp_path / 'weights.safetensors'}")
    images = torch.randn(1, 3, 64, 64)
    assert teacher(images).equal(model(images))
    with pytest.raises(CheckpointError, match=r"does not say which model it holds; give timm:NAME@"):
        load_teacher(str(tmp_path / "weights.safetensors"))


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", _no_network)
    with pytest.raises(CheckpointError, match=r"weights of timm:resnet10t: .*no route.*fastib teacher"):
        load_teacher("timm:resnet10t")
    with pytest.raises(CheckpointError, match=r"weights of timm:resnet11"):
        load_teacher("timm:resnet11")
    with pytest.raises(CheckpointError, match=r"there is no .*student\.safetensors; has the run finished"):
        load_teacher(f"run:{tmp_path}")
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_teacher(str(tmp_path / "gone.safetensors"))


def _no_network(*_args, **_kwargs):
    raise OSError("no route to host")


@pytest.mark.parametrize("name", ["teacher.pth", "teacher.pt", "teacher.bin", "teacher"])
def test_pickled_files_are_never_loaded(name, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    for source in (str(tmp_path / name), f"timm:resnet10t@{tmp_path / name}"):
        with pytest.raises(CheckpointError, match=r"pickled code.*are never loaded"):
            load_teacher(source)
    (tmp_path / "disguised.safetensors").write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"cannot read .*disguised\.safetensors"):
        load_student(tmp_path / "disguised.safetensors")


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_student(tmp_path / "student.safetensors", {"fc.weight": torch.ones(4, 16)}, SPEC)
    with pytest.raises(CheckpointError, match=r"student\.safetensors does not fit ResNet: .*Missing key.*conv1"):
        load_student(tmp_path / "student.safetensors")


def test_models_get_the_image_size_where_it_is_fixed():
    spec = {"kwargs": {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4}, "num_classes": 3, "in_chans": 1}
    vit = build_model("vit_tiny_patch16_224", img_size=12, **spec)
    assert vit.patch_embed.grid_size == (3, 3)
    assert vit(torch.zeros(2, 1, 12, 12)).shape == (2, 3)
    with pytest.raises(ConfigError, match="no model 'vit_tini_patch16_224'; did you mean vit_tiny_patch16_224, "):
        build_model("vit_tini_patch16_224", img_size=12, **spec)
    with pytest.raises(ConfigError, match=r"cannot build the model resnet18 with .*embed_dim"):
        build_model("resnet18", img_size=12, **spec)


def test_a_teacher_of_other_images_is_refused_before_there_is_a_run(tiny, tmp_path):
    train(tiny("epochs=1", "data.in_chans=3", output="teacher"))
    with pytest.raises(ConfigError, match=r"the teacher run:.*teacher does not take images of 1 x 16 x 16: "):
        train(tiny(f"method.teacher=run:{tmp_path / 'teacher'}", method="aal"))
    assert not (tmp_path / "run").exists()
