"""The demo from end to end, two steps per run."""

import json

import pytest

from fastib.train import demo


@pytest.mark.slow
def test_demo_trains_all_six_and_prints_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "imagenet_step", lambda: {"fused": 1.0, "eager": 2.0})
    folder = tmp_path / "demo"
    assert demo.main(["--output", str(folder), "--seed", "3", "steps=2", "data.eval_batch_size=360"]) == 0
    shown = capsys.readouterr().out
    for percent, images in (("100", 1437), ("10", 143)):
        for method in demo.LABELS:
            result = json.loads((folder / percent / method / "result.json").read_text())
            assert result["step"] == 2
            assert f"{result['top1']:.1f} %" in shown
            assert f"{images} training and 360 test images" in (folder / percent / f"{method}.log").read_text()
    for label in demo.LABELS.values():
        assert label in shown
    for picture in ("curves-100.png", "curves-10.png", "heads.png"):
        assert str(folder / picture) in shown.replace("\n", "")
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_race_takes_turns_between_the_backends():
    import timm

    import fastib.models  # noqa: F401  (registers the models)
    from fastib.nn import MHCA

    seen = []

    def build():
        model = timm.create_model(
            "dearkd_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, num_heads=4, depth=2, num_classes=3
        )
        images = demo.torch.zeros(1, 3, 8, 8)

        def loss():
            seen.append({m.backend for m in model.modules() if isinstance(m, MHCA)})
            return model(images).square().sum()

        return model, loss

    times = demo.race(build, steps=2)
    assert seen == 3 * [{None}, {"reference"}] and list(times) == ["fused", "eager"]
    assert all(milliseconds > 0 for milliseconds in times.values())
