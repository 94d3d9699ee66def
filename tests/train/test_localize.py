"""Localization on images whose boxes are known because they are drawn here, by a student made to look at brightness."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

from fastib.train.build import save_student
from fastib.train.cli import main
from fastib.train.config import save_config
from fastib.train.localize import THRESHOLDS, iou, largest_box, score_maps

MODEL = {"name": "vit_tiny_patch16_224", "num_classes": 2, "in_chans": 1, "img_size": 56}
MODEL |= {"kwargs": {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "class_token": True}}


def bright_student() -> torch.nn.Module:
    """Its class token's query is constant, and a patch's key is how bright the patch is, in all layers and heads."""
    model = timm.create_model(MODEL["name"], num_classes=2, in_chans=1, img_size=56, **MODEL["kwargs"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1 / 16
        model.patch_embed.proj.weight[1] = -1 / 16
        for block in model.blocks:
            block.norm1.weight.fill_(1.0)
            for head in range(2):
                block.attn.qkv.bias[4 * head] = 1.0  # q
                block.attn.qkv.weight[8 + 4 * head, 0] = 1.0  # k: after the norm, the sign of the patch's brightness
    return model


@pytest.fixture
def run(tiny, tmp_path):
    """The folder of a finished run whose student looks at what is bright."""
    config = tiny(output="run")
    data = config.data
    data.name, data.path, data.img_size, data.in_chans, data.num_classes = "folder", None, 56, 1, 2
    data.mean, data.std, data.eval_batch_size = [0.5], [0.5], 3
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    save_student(folder / "student.safetensors", bright_student().state_dict(), MODEL)
    return folder


BOXES = [(16, 32, 80, 96), (64, 16, 208, 112), (0, 0, 64, 224), (112, 128, 224, 224), (32, 48, 192, 160)]


@pytest.fixture
def drawn(tmp_path):
    """Five images of 224 x 112 pixels (they are squeezed) with a white box on black, and the CSV of the boxes."""
    root = tmp_path / "images"
    root.mkdir()
    lines = ["image,x0,y0,x1,y1"]
    for i, (x0, y0, x1, y1) in enumerate(BOXES):
        image = Image.new("L", (224, 112))
        ImageDraw.Draw(image).rectangle((x0, y0 // 2, x1 - 1, y1 // 2 - 1), fill=255)
        image.save(root / f"{i}.png")
        lines.append(f"{i}.png,{x0},{y0 // 2},{x1},{y1 // 2}")
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    return root


def localize(run, drawn, *options: str) -> int:
    return main(["eval", str(run), "--data", str(drawn), "--localization", str(drawn.parent / "boxes.csv"), *options])


def test_drawn_boxes_are_found(run, drawn, capsys):
    assert localize(run, drawn) == 0
    out = capsys.readouterr()
    scores = json.loads(out.out)
    row = scores["MaxBoxAcc"]["averaged attention"]
    assert scores["images"] == 5 and "averaged attention" in out.err
    assert [row[f"IoU {level}"] for level in (0.3, 0.5, 0.7)] == [100.0, 100.0, 100.0]
    assert row["mean 0.3, 0.5"] == row["mean 0.3, 0.5, 0.7"] == 100.0


def test_wrong_boxes_are_not_found(run, drawn, capsys):
    """Boxes that share exactly half, a quarter or nothing with what is white count where the IoU reaches the level."""
    lines = ["image,x0,y0,x1,y1"]
    for i, (x0, y0, x1, y1) in enumerate(BOXES):
        y0, y1 = y0 // 2, y1 // 2
        if i == 0:  # the whole
            lines.append(f"0.png,{x0},{y0},{x1},{y1}")
        elif i == 1:  # the left 5/9 of it: between the levels 0.5 and 0.7
            lines.append(f"1.png,{x0},{y0},{x0 + (x1 - x0) * 5 // 9},{y1}")
        elif i == 2:  # the upper 3/8 of it: between 0.3 and 0.5
            lines.append(f"2.png,{x0},{y0},{x1},{y0 + (y1 - y0) * 3 // 8}")
        else:  # somewhere else, but the best of several boxes counts
            lines.append(f"{i}.png,0,0,8,8")
    x0, y0, x1, y1 = BOXES[4]
    lines.append(f"4.png,{x0},{y0 // 2},{x1},{y1 // 2}")
    (drawn.parent / "boxes.csv").write_text("\n".join(lines))
    assert localize(run, drawn) == 0
    row = json.loads(capsys.readouterr().out)["MaxBoxAcc"]["averaged attention"]
    assert row["IoU 0.7"] == pytest.approx(40.0)
    assert row["IoU 0.5"] == pytest.approx(60.0)
    assert row["IoU 0.3"] == pytest.approx(80.0)
    assert row["mean 0.3, 0.5"] == pytest.approx(70.0) and row["mean 0.3, 0.5, 0.7"] == pytest.approx(60.0)


def test_overlays(run, drawn, capsys):
    assert localize(run, drawn, "--overlays", "2") == 0
    assert json.loads(capsys.readouterr().out)["overlays"] == str(run / "overlays")
    assert sorted(path.name for path in (run / "overlays").iterdir()) == ["0.png", "1.png"]
    picture = np.asarray(Image.open(run / "overlays/0.png").convert("RGB")).astype(int)
    assert picture.shape == (112, 224, 3)
    heat = picture[..., 0] - picture[..., 2]  # red where the attention is, blue elsewhere
    assert (heat[20:44, 24:72] > 50).all() and (heat[60:, 120:] < -50).all()
    red = (picture == (255, 0, 0)).all(-1).nonzero()
    found = red[1].min(), red[0].min(), red[1].max() + 1, red[0].max() + 1
    assert iou(found, (16, 16, 80, 48)) > 0.5


def test_boxes_of_spreadsheets_and_of_absolute_paths(run, drawn, capsys):
    (drawn.parent / "boxes.csv").write_text(f"\ufeffimage,x0,y0,x1,y1\n{drawn / '0.png'},16,16,80,48\n")
    link = drawn.parent / "link"  # under which the absolute path does not lie
    link.symlink_to(drawn)
    assert localize(run, link, "--overlays", "1") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    assert [path.suffix for path in (run / "overlays").iterdir()] == [".png"]


def test_score_maps_average_all_layers_and_heads():
    torch.manual_seed(0)
    model = timm.create_model("pit_ti_224", img_size=48, base_dims=(8, 8, 8), depth=(1, 2, 1)).eval()
    images, rows = torch.randn(2, 3, 48, 48), []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda _, args, __: rows.append(args[0][:, :, 0, 1:]))
    model(images)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    up = []
    for row in rows:
        side = round(row.shape[-1] ** 0.5)
        maps = (row / row.sum(-1, keepdim=True)).view(2, -1, side, side)
        up.append(torch.nn.functional.interpolate(maps, (30, 30), mode="bicubic"))
    mean = torch.cat(up, 1).mean(1)
    assert torch.cat(up, 1).shape[1] == 2 + 4 + 4 + 8
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    torch.testing.assert_close(score_maps(model, images, 30), (mean - low) / (high - low), rtol=1e-4, atol=1e-5)


def test_largest_box():
    score = np.zeros((10, 12))
    score[1:3, 1:3] = 1.0
    score[4:9, 5:8] = 0.5
    score[9, 8] = 0.5  # touches at a corner
    assert largest_box(score > 0.6) == (1, 1, 3, 3)
    assert largest_box(score > 0.4) == (5, 4, 9, 10)
    assert largest_box(score > -1) == (0, 0, 12, 10)
    assert largest_box(score > 2) == (0, 0, 1, 1)


def test_thresholds_are_those_of_the_published_evaluation():
    """Score maps of 8 bits against int(255 t) for the thousand t from 0 to 0.999: so many that no other one matters."""
    assert sorted({int(t * 255) for t in np.arange(0, 1, 0.001)}) == THRESHOLDS.tolist()


def test_boxes_between_coarse_thresholds_are_found(run, drawn, capsys, monkeypatch):
    """A step of one 255th around the object is seen: thresholds in hundredths would jump over it."""
    score = np.full((224, 224), 0.5)
    score[32:96, 16:80] += 1 / 255
    score[0, 0], score[0, 223] = 0.0, 1.0
    monkeypatch.setattr("fastib.train.localize.score_maps", lambda _, x: torch.tensor(score).expand(len(x), -1, -1))
    (drawn.parent / "boxes.csv").write_text("image,x0,y0,x1,y1\n0.png,16,16,80,48\n")
    assert localize(run, drawn) == 0
    row = json.loads(capsys.readouterr().out)["MaxBoxAcc"]["averaged attention"]
    assert [row[f"IoU {level}"] for level in (0.3, 0.5, 0.7)] == [100.0, 100.0, 100.0]
    assert row["threshold at 0.5"] == pytest.approx(127 / 255)
    assert not any((0.5 < t <= 0.5 + 1 / 255) for t in np.arange(100) / 100)


def test_iou():
    assert iou((0, 0, 4, 4), (0, 0, 4, 4)) == 1.0
    assert iou((0, 0, 4, 4), (2, 0, 6, 4)) == 8 / 24
    assert iou((0, 0, 4, 4), (4, 0, 8, 4)) == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"boxes\.csv: expected the columns image,x0,y0,x1,y1, got"),
        ("image,x0,y0,x1\n", r"boxes\.csv: expected the columns image,x0,y0,x1,y1, got image,x0,y0,x1"),
        ("image,x0,y0,x1,y1\n", r"boxes\.csv lists no boxes"),
        ("image,x0,y0,x1,y1\n0.png,1,1,5,5\n0.png,5,1,5,5\n", r"boxes\.csv, line 3: expected numbers with x0 < x1"),
        ("image,x0,y0,x1,y1\n0.png,1,1,wide,5\n", r"line 2: expected numbers"),
        ("image,x0,y0,x1,y1\n0.png,1,1,500,5\n", r"a box of .*0\.png is outside of its 224 x 112 pixels"),
        ("image,x0,y0,x1,y1\n9.png,1,1,5,5\n", r"cannot read the image .*9\.png"),
    ],
)
def test_bad_boxes(text, message, run, drawn, capsys):
    (drawn.parent / "boxes.csv").write_text(text)
    assert localize(run, drawn) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_bad_runs(run, drawn, tmp_path, capsys):
    for arguments, message in (
        ([str(run), "--localization", str(tmp_path / "boxes.csv")], "needs --data"),
        ([str(run), "--data", str(drawn), "--overlays", "3"], "--overlays goes with --localization"),
        ([str(run), "--data", str(drawn), "--localization", "gone.csv"], "cannot read the boxes gone.csv"),
        (
            [str(run), "--data", "gone", "--localization", str(tmp_path / "boxes.csv")],
            "the data path gone is no folder",
        ),
    ):
        assert main(["eval", *arguments]) == 1
        assert message in capsys.readouterr().err
    cnn = {"name": "digits_cnn", "kwargs": {"widths": [4]}, "num_classes": 2, "in_chans": 1, "img_size": 56}
    model = timm.create_model("digits_cnn", widths=[4], num_classes=2, in_chans=1)
    save_student(run / "student.safetensors", model.state_dict(), cnn)
    assert localize(run, drawn) == 1
    assert "has no attention maps: capture_cls_attention: model must have a class token" in capsys.readouterr().err
    (run / "student.safetensors").unlink()
    assert localize(run, drawn) == 1
    assert "the run has not finished" in capsys.readouterr().err
