"""Layers of the configuration, and what wrong ones say."""

import pytest

from fastib.methods import Method, get_method, list_methods, register_method
from fastib.train.config import RECIPES, list_recipes, load_config, read_config, save_config
from fastib.train.errors import ConfigError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optim: {lr: 0.25, kwargs: {eps: 1.0e-6}}\ndata: {augment: {scale: [0.5, 1.0]}}\nepochs: 7\n")
    return str(path)


def test_overrides_beat_the_recipe_and_the_recipe_the_defaults(recipe):
    config = load_config("plain", recipe, overrides=["epochs=9", "optim.kwargs.betas=[0.9,0.95]", "clip_grad=1e-3"])
    assert config.epochs == 9
    assert config.optim.lr == 0.25
    assert config.optim.kwargs == {"eps": 1e-6, "betas": [0.9, 0.95]}
    assert config.data.augment.scale == (0.5, 1.0)
    assert config.clip_grad == 1e-3
    assert config.optim.weight_decay == 0.05
    assert config.method.name == "plain"


def test_a_saved_configuration_reads_back_equal(recipe, tmp_path):
    config = load_config("plain", recipe, data=str(tmp_path), overrides=["model.kwargs.pairs=[[1,2],[3,4]]", "steps=3"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_data_is_a_folder_unless_it_is_the_digits(recipe):
    assert load_config("plain", recipe, data="some/images").data.name == "folder"
    assert load_config("plain", recipe, data="some/images").data.path == "some/images"
    assert load_config("plain", recipe, data="digits").data.name == "digits"
    other = load_config("plain", recipe, data="some/cifar", overrides=["data.name=torch/cifar10"])
    assert (other.data.name, other.data.path) == ("torch/cifar10", "some/cifar")


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_of_the_package_are_valid(name):
    method, recipe = name.split("/")
    assert load_config(method, recipe).method.name in list_methods()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], r"unknown key optim\.learning_rate; known keys: opt, lr"),
        (["optm.lr=1"], "unknown key optm; did you mean optim"),
        (["epohcs=1"], "unknown key epohcs; did you mean epochs"),
        (["method.alpha=1"], r"unknown key method\.alpha"),
        (["optim.lr=fast"], r"optim\.lr: .*'fast'.*Float"),
        (["epochs=1.5"], "epochs: .*Integer"),
        (["precision=fp8"], "precision: .*fp8.*bf16"),
        (["epochs=3", "model=vit"], "model=vit: .*str is not a subclass of ModelConfig"),
        (["optim.lr=[1"], r"cannot read the override 'optim\.lr=\[1'"),
        (["epochs=0"], "epochs must be at least 1, got 0"),
        (["data.train_fraction=0"], r"train_fraction must be in \(0, 1\], got 0"),
        (["ema.decay=1"], r"ema\.decay must be in \[0, 1\)"),
        (["data.batch_size=10", "grad_accum=4"], "batch_size=10 does not split into grad_accum=4"),
        (["clip_grad=0"], r"clip_grad must be above 0, got 0\.0"),
        (["clip_grad=-1"], r"clip_grad must be above 0, got -1\.0"),
        (["data.workers=-1"], r"data\.workers must be at least 0, got -1"),
        (["data.img_size=0"], r"data\.img_size must be at least 1, got 0"),
        (["data.split_seed=-1"], r"data\.split_seed must be in \[0, 2\^32\), got -1"),
        (["data.eval_fraction=1"], r"data\.eval_fraction must be in \(0, 1\), got 1\.0"),
        (["data.augment.mixup=-1"], r"data\.augment\.mixup must be at least 0, got -1\.0"),
        (["data.augment.smoothing=2"], r"data\.augment\.smoothing must be in \[0, 1\], got 2\.0"),
        (["sched.decay_epochs=0"], r"sched\.decay_epochs must be above 0, got 0\.0"),
        (["sched.min_lr=-1"], r"sched\.min_lr must be at least 0, got -1\.0"),
        (["data.crop_pct=0"], r"data\.crop_pct must be above 0, got 0\.0"),
        (["data.std=[1,0,1]"], r"data\.std must be above 0, got 0\.0"),
        (["data.augment.reprob=2"], r"data\.augment\.reprob must be in \[0, 1\], got 2\.0"),
        (["data.augment.color_jitter=-1"], r"data\.augment\.color_jitter must be at least 0, got -1\.0"),
        (["data.augment.zoom=1"], r"data\.augment\.zoom must be in \[0, 1\), got 1\.0"),
        (["data.augment.remode=x"], r"data\.augment\.remode: Invalid value 'x', expected one of \['const', 'rand', "),
        (["data.augment.interpolation=random"], "interpolation: Invalid value 'random', expected one of .'bicubic', "),
        (["data.augment.ratio=[0,1]"], r"\.ratio must be \[low, high\] with 0 < low <= high, got \[0\.0, 1\.0\]"),
        (["data.augment.scale=[1,0.5]"], r"\.scale must be \[low, high\] with 0 < low <= high, got \[1\.0, 0\.5"),
        (["model.kwargs={depth:1}"], "model.kwargs: expected names of arguments, got 'depth:1': write {name: value}$"),
        (["optim.kwargs={eps:1}"], "optim.kwargs: expected names of arguments, got 'eps:1'"),
        (["data.path=images"], r"data\.path=images does not go with data\.name=digits: give --data"),
        (["method.name=dearkd"], r"method\.name=dearkd: it is for the method 'dearkd', not for 'plain'"),
        (["method.name=mars"], r"method\.name=mars: it is for the method 'mars', not for 'plain'"),
    ],
)
def test_wrong_values_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("plain", overrides=overrides)


def test_float32_can_be_asked_for_over_another_precision():
    assert load_config("plain", overrides=["precision=bf16", "precision=no"]).precision == "no"


def test_a_recipe_of_another_method_is_refused():
    with pytest.raises(ConfigError, match=r"dearkd/digits\.yaml: it is for the method 'dearkd', not for 'plain'"):
        load_config("plain", str(RECIPES / "dearkd" / "digits.yaml"))
    assert load_config("teacher", str(RECIPES / "dearkd" / "digits.yaml")).method.name == "dearkd"


def test_wrong_methods_and_recipes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown method 'plian'; known methods: .*plain"):
        load_config("plian")
    with pytest.raises(ConfigError, match="method 'plain' has no recipe 'mars'; it has: "):
        load_config("plain", "mars")
    with pytest.raises(ConfigError, match=r"no recipe file .*missing\.yaml"):
        load_config("plain", str(tmp_path / "missing.yaml"))
    (tmp_path / "broken.yaml").write_text("epochs: [1\n")
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.yaml"):
        load_config("plain", str(tmp_path / "broken.yaml"))


def test_methods_register_under_one_name_and_with_proper_options():
    with pytest.raises(ValueError, match="'plain' is already registered by Plain"):
        register_method("plain")(type("Other", (Method,), {}))
    with pytest.raises(TypeError, match="Options must be a dataclass derived from MethodOptions"):
        register_method("odd")(type("Odd", (Method,), {"Options": dict}))
    assert get_method("plain").__name__ == "Plain"


def test_a_teacher_on_a_folder_of_images_has_a_recipe(tmp_path):
    config = load_config("teacher", data=str(tmp_path), overrides=["model.name=resnet34"])
    assert (config.method.name, config.model.name, config.data.path) == ("plain", "resnet34", str(tmp_path))
