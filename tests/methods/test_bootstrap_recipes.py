"""The recipes of Bootstrapping ViTs: the paper's numbers, and a baseline that differs in nothing but the method."""

from dataclasses import asdict

from fastib.train.config import load_config


def test_cifar_recipe_has_the_numbers_of_the_paper():
    config = load_config("bootstrap", "cifar100_small", data="anywhere")
    method, data, augment = config.method, config.data, config.data.augment
    assert config.model.name == "bootstrap_vit_small_patch16_224"
    assert (method.label_weight, method.mutual_weight, method.feature_weight) == (1.0, 1.0, 10.0)
    assert (method.temperature, method.decay, method.pooling, method.layers) == (4.0, "linear", "sequence", [])
    assert (method.form, method.pre_norm, method.down_sample) == ("res", True, [0, 1])
    assert (data.name, data.path, data.batch_size, data.img_size) == ("cifar100", "anywhere", 64, 224)
    assert (data.mean, data.std) == ([0.5071, 0.4867, 0.4408], [0.2023, 0.1994, 0.2010])
    assert (augment.hflip, augment.crop_padding, augment.mixup, augment.cutmix) == (0.5, 4, 0.0, 0.0)
    assert (augment.auto_augment, augment.color_jitter, augment.reprob, augment.smoothing) == (None, 0.0, 0.0, 0.0)
    assert (config.epochs, config.sched.sched, config.sched.warmup_epochs, config.sched.min_lr) == (240, "cosine", 0, 0)
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == ("adamw", 1e-3, 0.05)
    assert not config.optim.filter_bias_and_bn


def test_digits_baseline_is_fair():
    student, plain = load_config("bootstrap", "digits"), load_config("plain", "digits")
    for part in ("model", "data", "optim", "sched", "ema"):
        assert asdict(getattr(student, part)) == asdict(getattr(plain, part))
    assert (student.epochs, student.clip_grad, student.precision) == (plain.epochs, plain.clip_grad, plain.precision)
