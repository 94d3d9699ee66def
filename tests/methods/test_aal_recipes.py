"""The recipes of AAL: the paper's numbers, and a baseline that differs in nothing but the method."""

from dataclasses import asdict

import timm
import torch

import fastib.models  # noqa: F401  (registers the models)
from fastib.methods.aal import cnn_stages
from fastib.train.config import load_config


def test_imagenet_recipe_has_the_numbers_of_the_paper():
    config = load_config("aal", "imagenet_small", data="anywhere")
    method, data, augment = config.method, config.data, config.data.augment
    assert config.model.name == "deit_small_distilled_patch16_224"
    assert method.teacher.startswith("timm:efficientnet_b3") and timm.is_model(method.teacher.removeprefix("timm:"))
    assert (method.weight, method.decay, method.decay_epochs) == (2000.0, [0.99, 0.98], [200, 100])
    assert sum(method.decay_epochs) == config.epochs == 300
    assert (method.links, method.over, method.scale) == ("alpha", "patches", None)
    assert (data.name, data.path, data.batch_size, data.img_size, data.train_fraction) == (
        "folder", "anywhere", 512, 224, 0.1,
    )  # fmt: skip
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == ("adamw", 5e-4, 0.05)
    assert (config.sched.sched, config.sched.warmup_epochs) == ("cosine", 5)
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.reprob, augment.smoothing, augment.repeats) == (0.25, 0.1, 3)


def test_the_other_models_that_the_recipe_names_exist():
    with torch.device("meta"):
        for name in ("deit_base_distilled_patch16_224", "pit_s_224"):
            timm.create_model(name)
        assert cnn_stages(timm.create_model("efficientnet_b3")) is None
        assert cnn_stages(timm.create_model("resnet34")) == [1, 2, 3, 4]


def test_digits_baseline_and_teacher_are_fair():
    student, plain, teacher = (
        load_config("aal", "digits"),
        load_config("plain", "digits"),
        load_config("teacher", "digits"),
    )
    for part in ("model", "data", "optim", "sched", "ema"):
        assert asdict(getattr(student, part)) == asdict(getattr(plain, part))
    assert (student.epochs, student.clip_grad, student.precision) == (plain.epochs, plain.clip_grad, plain.precision)
    assert asdict(student.data) == asdict(teacher.data)
    assert student.method.teacher == "own:cnn" and student.teachers["cnn"].recipe == "teacher/digits"


def test_folder_recipe_trains_its_teacher():
    config = load_config("aal", data="anywhere")
    assert (config.data.name, config.data.path, config.method.teacher) == ("folder", "anywhere", "own:cnn")
    assert config.teachers["cnn"].recipe == "teacher/folder" and timm.is_model(config.model.name)
