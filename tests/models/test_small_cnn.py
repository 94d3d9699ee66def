"""The small CNN teacher: size, features in one pass, and timm's conventions."""

import pytest
import timm
import torch
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)


def cnn(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("digits_cnn", **{"in_chans": 1, "widths": (4, 6, 8), **kwargs})


def parameters(chans: int, widths: tuple[int, ...], blocks: int, classes: int) -> int:
    total = 0
    for before, width in zip((chans, *widths), widths, strict=False):
        total += 9 * before * width + 2 * width + blocks * 2 * (9 * width * width + 2 * width)
    return total + (widths[-1] + 1) * classes


@pytest.mark.parametrize(("chans", "widths", "blocks"), [(1, (32, 64, 128), 1), (3, (4, 6), 2)])
def test_parameter_count(chans, widths, blocks):
    model = timm.create_model("digits_cnn", in_chans=chans, widths=widths, blocks=blocks)
    assert sum(p.numel() for p in model.parameters()) == parameters(chans, widths, blocks, 10)


def test_output_equals_a_functional_recomputation():
    model = cnn().double().eval()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)

    def conv(x, layer, stride=1):
        norm = layer[1]
        y = F.conv2d(x, layer[0].weight, stride=stride, padding=1)
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]
        return (y - norm.running_mean[:, None, None]) * scale + norm.bias[:, None, None]

    x = y = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for i, stage in enumerate(model.stages):
        y = conv(y, stage[0], 1 if i == 0 else 2).relu()
        y = (y + conv(conv(y, stage[1].conv1).relu(), stage[1].conv2)).relu()
    expected = y.mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_pools_as_it_is_told():
    model, x = cnn(global_pool="max").double().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    maps = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(maps.amax((2, 3))))
    model.reset_classifier(3, "catavgmax")
    torch.testing.assert_close(model(x), model.head(torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), 1)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), maps)


def test_features_only_equals_the_intermediates_of_one_pass():
    model, extractor = cnn().eval(), cnn(features_only=True, out_indices=(0, 1)).eval()
    assert extractor.feature_info.channels() == [4, 6] and extractor.feature_info.reduction() == [1, 2]
    x = torch.randn(2, 1, 8, 8)
    final, maps = model.forward_intermediates(x, indices=[0, 1])
    torch.testing.assert_close(extractor(x), maps)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 8, 8), (2, 6, 4, 4)]


def test_classifier_can_be_replaced():
    model = cnn().eval()
    x = torch.randn(2, 1, 8, 8)
    pooled = model.forward_features(x).mean((2, 3))
    model.reset_classifier(3)
    assert model.get_classifier() is model.head and model.num_classes == 3
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))


def test_gradient_checkpointing_keeps_the_gradients():
    model = cnn().double().train()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_no_stage_is_an_error():
    with pytest.raises(ValueError, match="widths"):
        cnn(widths=())
