"""The command line: exit codes, one-line errors, and what the commands print."""

import json

import numpy as np
import pytest
from PIL import Image

import fastib
import fastib.train.evaluate as module
from fastib.train.cli import main
from fastib.train.config import read_config, save_config
from fastib.train.loop import train


def test_train_eval_and_resume(tiny, tmp_path, capsys):
    save_config(tiny("epochs=1"), tmp_path / "recipe.yaml")
    assert main(["train", "plain", "--recipe", str(tmp_path / "recipe.yaml"), "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "epoch   1" in out
    assert "287 training and 360 test images, 4 steps on 1 x cpu" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == result["top1"]
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "going on at step 4" in capsys.readouterr().out


def test_info_lists_what_there_is(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"fastib {fastib.__version__}" in out
    assert "mhca_attention" in out
    assert "dearkd_tiny_patch16_224" in out
    assert "plain" in out
    assert "dearkd/digits" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "which method?"),
        (["train", "epochs=3"], "which method?"),
        (["train", "plian"], "unknown method 'plian'"),
        (["train", "plain", "--recipe", "mars"], "has no recipe 'mars'"),
        (["train", "plain", "--data", "nowhere/at/all"], "the data path nowhere/at/all does not exist"),
        (["train", "plain", "optm.lr=1"], "did you mean optim?"),
        (["train", "plain", "model.name=vit_giant"], "timm has no model 'vit_giant'"),
        (["train", "dearkd", "method.teacher=teacher.pth"], "never loaded"),
        (["train", "plain", "--resume", "gone"], "cannot resume gone"),
        (["train", "plain", "--resume", "gone", "epochs=3"], "give --resume alone"),
        (["train", "--resume", "gone", "plain", "epochs=3"], "give --resume alone"),
        (["train", "plain", "dearkd"], "cannot read the override 'dearkd'"),
        (["eval", "gone"], "cannot read gone/config.yaml"),
        (["train", "plain", "seed=[1"], "cannot read the override 'seed=[1': while parsing a flow sequence"),
        (["train", "plain", "output=/dev/null"], "output=/dev/null: cannot make the folder: [Errno 17] File exists"),
        (["train", "plain", "model.kwargs.img_size=16"], "does not take images of 1 x 8 x 8: Input height (8)"),
        (["compare", "--output", "/dev/null"], "[Errno 17] File exists: '/dev/null'"),
    ],
)
def test_errors_are_one_line_and_exit_code_one(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_unreadable_image_is_named_from_a_loader_process(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for label in ("ant", "bee"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / label / f"{i}.png")
    (tmp_path / "images" / "bee" / "2.png").write_bytes(b"\x89PNG and nothing more")
    options = ["data.img_size=16", "data.batch_size=2", "data.workers=1", "data.eval_fraction=0.5", "epochs=1"]
    model = ["model.name=vit_tiny_patch16_224", "model.kwargs={depth: 1, embed_dim: 8, num_heads: 1}", "device=cpu"]
    assert main(["train", "plain", "--data", "images", *options, *model]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read the image ")
    assert "bee/2.png" in error
    assert error.count("\n") == 1


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "plain", "data.batch_size=2000", "output=run"]) == 1
    assert capsys.readouterr().err == "error: data.batch_size=2000 is more than the 1437 training images\n"
    assert list(tmp_path.iterdir()) == []


def test_all_images_of_another_folder_are_evaluated(tiny, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, count in (("images", 10), ("others", 4)):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"{i}.png")
    options = ["data.name=folder", f"data.path={tmp_path / 'images'}", "data.train_fraction=0.5", "data.batch_size=4",
               "data.workers=0", "epochs=1"]  # fmt: skip
    train(tiny(*options))
    seen = []
    original = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda model, loader, *rest: seen.append(len(loader.dataset)) or
                        original(model, loader, *rest))  # fmt: skip
    for data in (None, str(tmp_path / "images"), str(tmp_path / "others")):
        module.evaluate_run(tmp_path / "run", data)
    assert seen == [4, 4, 8]


def test_other_images_must_have_the_classes_of_the_run_by_name(tiny, tmp_path, capsys):
    """Names that YAML reads as numbers or truth values stay names; a run that does not know them compares numbers."""
    for name, labels in (("images", ("007", "no")), ("others", ("007", "yes")), ("more", ("007", "no", "yes"))):
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / label / f"{i}.png")
    train(tiny("data.name=folder", f"data.path={tmp_path / 'images'}", "data.batch_size=2", "data.workers=0",
               "data.train_fraction=1", "epochs=1"))  # fmt: skip
    run, wrong = str(tmp_path / "run"), "are not those of the run (data.classes): "
    assert read_config(tmp_path / "run" / "config.yaml").data.classes == ["007", "no"]
    assert main(["eval", run, "--data", str(tmp_path / "images")]) == 0
    capsys.readouterr()
    for other, difference in (("others", "missing: no; unknown: yes"), ("more", "unknown: yes")):
        assert main(["eval", run, "--data", str(tmp_path / other)]) == 1
        assert capsys.readouterr().err == f"error: the classes of {tmp_path / other} {wrong}{difference}\n"
    assert main(["eval", run, "--data", "digits"]) == 1
    assert capsys.readouterr().err == (
        f"error: the classes of the digits {wrong}missing: 007, no; unknown: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
    )
    (tmp_path / "images" / "no").rename(tmp_path / "images" / "yes")
    assert main(["train", "--resume", run]) == 1
    assert "missing: no; unknown: yes" in capsys.readouterr().err
    config = read_config(tmp_path / "run" / "config.yaml")
    config.data.classes = None  # a run of an earlier version
    save_config(config, tmp_path / "run" / "config.yaml")
    assert main(["eval", run, "--data", str(tmp_path / "others")]) == 0
