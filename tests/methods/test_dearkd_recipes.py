"""The recipes of DearKD: the paper's numbers, and a baseline that differs in nothing but the method."""

from dataclasses import asdict

import pytest
import timm
import torch

import fastib.models  # noqa: F401  (registers the models)
from fastib.nn import MHCA
from fastib.train.config import load_config


def test_imagenet_recipe_has_the_numbers_of_the_paper():
    config = load_config("dearkd", "imagenet", data="anywhere")
    method, data, augment = config.method, config.data, config.data.augment
    assert config.model.name == "dearkd_tiny_patch16_224" and config.model.kwargs["drop_path_rate"] == 0.1
    assert (config.epochs, method.stage_one_share * config.epochs, method.stage_two) == (
        300,
        pytest.approx(250),
        "ramp",
    )
    assert method.teacher.startswith("timm:regnety_160") and timm.is_model(method.teacher.removeprefix("timm:"))
    assert (method.alpha, method.beta) == (0.5, 1.0)
    assert (data.name, data.path, data.batch_size, data.img_size) == ("folder", "anywhere", 2048, 224)
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == ("adamw", 5e-4, 0.05)
    assert (config.sched.sched, config.sched.warmup_epochs) == ("cosine", 5)
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.reprob, augment.smoothing, augment.repeats) == (0.25, 0.1, 3)


def test_imagenet_recipe_pairs_exist():
    config = load_config("dearkd", "imagenet", data="anywhere")
    with torch.device("meta"):
        teacher = timm.create_model("regnety_160")
        student = timm.create_model(config.model.name)
    assert [teacher.feature_info[s]["num_chs"] for s in config.method.teacher_stages] == [224, 448, 1232]
    assert all(isinstance(student.blocks[b].attn, MHCA) for b in config.method.student_blocks)


def test_digits_baseline_is_fair():
    student, plain = load_config("dearkd", "digits"), load_config("plain", "digits")
    for part in ("data", "optim", "sched", "ema"):
        assert asdict(getattr(student, part)) == asdict(getattr(plain, part))
    assert (student.epochs, student.clip_grad, student.precision) == (plain.epochs, plain.clip_grad, plain.precision)
    own = {"mhca_depth", "rpe_drop_rate"}
    assert {k: v for k, v in student.model.kwargs.items() if k not in own} == plain.model.kwargs
    sizes = [
        sum(
            p.numel()
            for p in timm.create_model(
                c.model.name, img_size=8, in_chans=1, num_classes=10, **c.model.kwargs
            ).parameters()
        )
        for c in (student, plain)
    ]
    assert sizes[0] - sizes[1] == student.model.kwargs["mhca_depth"] * 3 * student.model.kwargs["num_heads"]


def test_digits_teacher_shares_the_data():
    student, teacher = load_config("dearkd", "digits"), load_config("teacher", "digits")
    assert asdict(student.data) == asdict(teacher.data) and teacher.method.name == "plain"
