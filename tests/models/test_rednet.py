"""RedNet: exact sizes, its blocks by definition, features, published key names, and timm's conventions."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.models import RedNet, convert_published_rednet
from fastib.nn import Involution2d

SIZES = {26: 9_233_166, 38: 12_386_986, 50: 15_540_806, 101: 25_652_950, 152: 33_984_582}
BLOCKS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def small(**kwargs) -> RedNet:
    options = {"layers": (1, 2), "widths": (16, 32), "stem_width": 32, "kernel_size": 3, "num_classes": 5}
    torch.manual_seed(0)
    return timm.create_model("rednet26", **{**options, **kwargs})


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters and running statistics moved off their initial values; float64, evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.double().eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("depth", SIZES)
def test_parameter_counts(depth):
    with torch.device("meta"):
        model = timm.create_model(f"rednet{depth}")
    assert sum(p.numel() for p in model.parameters()) == SIZES[depth]
    assert sum(p.numel() for p in model.stem.parameters()) == 19_986
    assert tuple(len(stage) for stage in model.stages) == BLOCKS[depth]
    involutions = [m for m in model.modules() if isinstance(m, Involution2d)]
    assert [m.kernel_size for m in involutions] == [3] + [7] * sum(BLOCKS[depth])
    assert [m.stride for m in involutions].count(2) == 3


def test_the_stem_of_dense_tasks_has_a_kernel_of_seven():
    with torch.device("meta"):
        model = timm.create_model("rednet50", stem_kernel_size=7)
    assert model.stem.inv.kernel_size == 7
    # 2 groups of 7 x 7 taps in place of 3 x 3, from 8 channels and a bias
    assert sum(p.numel() for p in model.parameters()) == SIZES[50] + 2 * (49 - 9) * (8 + 1)


def norm(x: torch.Tensor, layer: torch.nn.BatchNorm2d) -> torch.Tensor:
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    return (x - layer.running_mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]


def involve(x: torch.Tensor, layer: Involution2d) -> torch.Tensor:
    """The involution by its definition, one place at a time."""
    batch, channels, height, width = x.shape
    s, d, k, half = layer.stride, layer.dilation, layer.kernel_size, layer.kernel_size // 2
    rows, columns = -(-height // s), -(-width // s)
    cells = torch.stack(
        [
            torch.stack([x[:, :, i * s : i * s + s, j * s : j * s + s].mean((2, 3)) for j in range(columns)], -1)
            for i in range(rows)
        ],
        -2,
    )
    hidden = norm(torch.einsum("oc,bcij->boij", layer.reduce.weight[:, :, 0, 0], cells), layer.norm).relu()
    spanned = torch.einsum("oc,bcij->boij", layer.span.weight[:, :, 0, 0], hidden) + layer.span.bias[:, None, None]
    y = x.new_zeros(batch, channels, rows, columns)
    for c in range(channels):
        group = c // (channels // layer.groups)
        for u in range(k):
            for v in range(k):
                kernel = spanned[:, (group * k + u) * k + v]
                for i in range(rows):
                    for j in range(columns):
                        row, column = i * s + (u - half) * d, j * s + (v - half) * d
                        if 0 <= row < height and 0 <= column < width:
                            y[:, c, i, j] += kernel[:, i, j] * x[:, c, row, column]
    return y


@pytest.mark.parametrize("output_stride", [None, 4])
@pytest.mark.parametrize("size", [(16, 12), (13, 9)])
def test_output_equals_a_functional_recomputation(size, output_stride):
    model = shaken(small(output_stride=output_stride))
    x = y = images(2, 3, *size)
    stem = model.stem
    y = norm(F.conv2d(y, stem.conv1.weight, stride=2, padding=1), stem.norm1).relu()
    y = norm(involve(y, stem.inv), stem.norm2).relu()
    y = norm(F.conv2d(y, stem.conv2.weight, padding=1), stem.norm3).relu()
    y = F.max_pool2d(y, 3, 2, 1)
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage):
            stride = 2 if i > 0 and j == 0 and output_stride is None else 1
            assert (block.inv.stride, block.inv.dilation) == (stride, 2 if output_stride and i > 0 and j > 0 else 1)
            shortcut = y
            if j == 0:
                shortcut = norm(F.conv2d(y, block.downsample[0].weight, stride=stride), block.downsample[1])
            y = norm(F.conv2d(y, block.conv1.weight), block.norm1).relu()
            y = norm(involve(y, block.inv), block.norm2).relu()
            y = (norm(F.conv2d(y, block.conv2.weight), block.norm3) + shortcut).relu()
    expected = y.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_blocks_start_as_their_shortcuts():
    model = small().double().eval()
    block = model.stages[1][1]
    x = images(1, 128, 4, 4).relu()
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_features_only_equals_the_intermediates_of_one_pass():
    model = shaken(small())
    extractor = small(features_only=True, out_indices=(0, 1, 2)).double().eval()
    weights = {f"model.{k}": v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    extractor.load_state_dict(weights)
    assert extractor.feature_info.channels() == [32, 64, 128] and extractor.feature_info.reduction() == [2, 4, 8]
    x = images(2, 3, 19, 16)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(extractor(x), maps)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(maps[0], model.stem(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 10, 8), (64, 5, 4), (128, 3, 2)]
    first = small(features_only=True, out_indices=(0,)).double().eval()
    stem = {k: v for k, v in weights.items() if k.startswith("model.stem.")}
    first.load_state_dict(stem)
    torch.testing.assert_close(first(x), maps[:1])


def test_features_of_rednet_50():
    with torch.device("meta"):
        extractor = timm.create_model("rednet50", features_only=True)
        maps = extractor(torch.zeros(1, 3, 64, 96))
    assert extractor.feature_info.channels() == [64, 256, 512, 1024, 2048]
    assert extractor.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 32, 48),
        (256, 16, 24),
        (512, 8, 12),
        (1024, 4, 6),
        (2048, 2, 3),
    ]


def test_output_stride_dilates_in_place_of_striding():
    options = {"layers": (1, 1, 2), "widths": (16, 32, 48)}
    strided, dilated = shaken(small(**options)), shaken(small(**options, output_stride=8))
    places = [(b.inv.stride, b.inv.dilation) for stage in dilated.stages for b in stage]
    assert places == [(1, 1), (2, 1), (1, 1), (1, 2)]
    assert dilated.feature_info[-1]["reduction"] == 8
    assert {k: v.shape for k, v in strided.state_dict().items()} == {
        k: v.shape for k, v in dilated.state_dict().items()
    }
    assert dilated.forward_features(images(1, 3, 32, 32)).shape[2:] == (4, 4)


def published(model: RedNet) -> dict[str, torch.Tensor]:
    """The model's weights under the names of the published classifiers, spelt out layer by layer."""

    def norms(ours, theirs):
        return {f"{ours}.{n}": f"{theirs}.{n}" for n in ("weight", "bias", "running_mean", "running_var",
                                                         "num_batches_tracked")}  # fmt: skip

    def involution(ours, theirs):
        names = {f"{ours}.reduce.weight": f"{theirs}.conv1.conv.weight"}
        names |= norms(f"{ours}.norm", f"{theirs}.conv1.bn")
        return names | {f"{ours}.span.{n}": f"{theirs}.conv2.conv.{n}" for n in ("weight", "bias")}

    names = {"stem.conv1.weight": "backbone.stem.0.conv.weight", "stem.conv2.weight": "backbone.stem.4.conv.weight"}
    names |= norms("stem.norm1", "backbone.stem.0.bn") | norms("stem.norm3", "backbone.stem.4.bn")
    names |= involution("stem.inv", "backbone.stem.1") | norms("stem.norm2", "backbone.stem.2")
    for i, stage in enumerate(model.stages):
        for j in range(len(stage)):
            ours, theirs = f"stages.{i}.{j}", f"backbone.layer{i + 1}.{j}"
            names |= {
                f"{ours}.conv1.weight": f"{theirs}.conv1.weight",
                f"{ours}.conv2.weight": f"{theirs}.conv3.weight",
            }
            for n in (1, 2, 3):
                names |= norms(f"{ours}.norm{n}", f"{theirs}.bn{n}")
            names |= involution(f"{ours}.inv", f"{theirs}.conv2")
            if j == 0:
                names[f"{ours}.downsample.0.weight"] = f"{theirs}.downsample.0.weight"
                names |= norms(f"{ours}.downsample.1", f"{theirs}.downsample.1")
    names |= {"fc.weight": "head.fc.weight", "fc.bias": "head.fc.bias"}
    weights = model.state_dict()
    assert weights.keys() == names.keys()
    return {names[key]: value for key, value in weights.items()}


def test_published_names_are_converted_and_back():
    model = shaken(small())
    theirs = published(model)
    for state_dict in (theirs, {"meta": {}, "state_dict": theirs}):
        converted = convert_published_rednet(state_dict)
        assert converted.keys() == model.state_dict().keys()
        other = small().double().eval()
        other.load_state_dict(converted)
        x = images(2, 3, 16, 16)
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    backbone = {k.removeprefix("backbone."): v for k, v in theirs.items() if k.startswith("backbone.")}
    assert convert_published_rednet(backbone).keys() == {k for k in converted if not k.startswith("fc.")}


@pytest.mark.parametrize(
    "key", ["conv1.weight", "backbone.layer1.0.conv2.weight", "backbone.stem.3.weight", "layer0.x", "head.weight"]
)
def test_other_names_are_refused(key):
    with pytest.raises(ValueError, match=f"expected keys of a published RedNet, got {re.escape(repr(key))}"):
        convert_published_rednet({key: torch.ones(1)})


def test_published_weights_in_a_file_are_a_pretrained_model(tmp_path):
    model = shaken(small()).float()
    for name, weights in (("ours", model.state_dict()), ("theirs", published(model))):
        save_file(weights, tmp_path / f"{name}.safetensors")
        overlay = {"file": str(tmp_path / f"{name}.safetensors"), "num_classes": 5}
        other = small(pretrained=True, pretrained_cfg_overlay=overlay).eval()
        x = images(2, 3, 16, 16).float()
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_weights_survive_safetensors(tmp_path):
    model = shaken(small())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = small().double().eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_classifier_can_be_replaced():
    model = shaken(small())
    x = images(2, 3, 16, 16)
    pooled = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    model.reset_classifier(3)
    assert model.get_classifier() is model.fc and model.num_classes == 3
    torch.testing.assert_close(model(x), pooled @ model.fc.weight.T + model.fc.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))


def test_gradient_checkpointing_keeps_the_gradients():
    model = shaken(small(drop_path_rate=0.3)).train()
    x = images(4, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_the_digits_teacher_keeps_the_resolution_of_small_images():
    torch.manual_seed(0)
    model = timm.create_model("digits_inn", in_chans=1).eval()
    maps = model.forward_intermediates(torch.randn(2, 1, 8, 8), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 8, 8), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4]
    assert model.pretrained_cfg["input_size"] == (1, 8, 8) and model.num_classes == 10


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"layers: expected one per width \(2\), got 1"):
        small(layers=(1,))
    with pytest.raises(ValueError, match="layers: expected"):
        small(layers=(), widths=())
    with pytest.raises(ValueError, match="channels must be a multiple of group_channels=16, got 24"):
        small(widths=(16, 24))
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        small(kernel_size=4)
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NLC'"):
        small().forward_intermediates(torch.zeros(1, 3, 16, 16), output_fmt="NLC")
