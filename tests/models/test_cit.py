"""The CiT models: exact sizes, what each token is, both kinds of inference, and timm's conventions."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.models import CiT
from fastib.nn import Involution2d

SIZES = {
    "cit_tiny_patch16_224": 6_104_184,
    "cit_small_patch16_224": 22_822_200,
    "cit_small_aligned_patch16_224": 25_776_138,
}
CONV_STEM, INV_STEM = 1_656_768, 1_593_234
ALIGNED = {"stems": ("conv", "inv"), "stem_width": 32}


def small(**kwargs) -> CiT:
    options = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 36, "num_heads": 3}
    torch.manual_seed(0)
    return timm.create_model("cit_tiny_patch16_224", **{**options, "depth": 2, **kwargs})


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters and running statistics moved off their initial values; float64, evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.double().eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert model.pos_embed.shape[1] == 199 and model.num_prefix_tokens == 3
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and model.pretrained_cfg["architecture"] == name


def test_parameter_counts_of_the_stems():
    with torch.device("meta"):
        model = timm.create_model("cit_small_aligned_patch16_224")
        tiny = timm.create_model("cit_tiny_patch16_224", stems=("conv", "inv"))
    assert [sum(p.numel() for p in s.parameters()) for s in model.patch_embed.stems] == [CONV_STEM, INV_STEM]
    assert sum(p.numel() for p in tiny.parameters()) == 7_632_906
    # CiT-S has 16 * 16 * 3 weights and a bias per channel, and two learned tokens, in place of the stems
    assert SIZES["cit_small_aligned_patch16_224"] - 22_822_200 == CONV_STEM + INV_STEM - (768 + 1 + 2) * 384


def sequence(model: CiT, x: torch.Tensor) -> torch.Tensor:
    """What enters the first block."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(x)
    handle.remove()
    return seen[0]


def recomputed(model: CiT, x: torch.Tensor) -> list[torch.Tensor]:
    """Maps (B, 9, 36) of the two stems of a small aligned model, layer by layer."""
    conv, inv = model.patch_embed.stems
    y, z, maps = x, x, []
    for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1))):
        layer, norm = conv.layers[3 * i : 3 * i + 2]
        y = F.conv2d(y, layer.weight, None, stride, padding)
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    z = F.conv2d(z, inv.layers.conv1.weight, None, 2, 1)
    for name, layer in (("norm1", None), ("norm2", inv.layers.inv), ("norm3", inv.layers.conv2)):
        z = z if layer is None else layer(z)
        norm = getattr(inv.layers, name)
        z = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    for stem, hidden in ((conv, y), (inv, z)):
        cells = F.unfold(hidden, 2, stride=2)  # 4 x 4 pixels are 2 x 2 places of the stems
        weight = stem.proj.weight.flatten(1)
        maps.append((weight @ cells).transpose(1, 2) + stem.proj.bias)
    return maps


def test_aligned_tokens_are_the_means_of_their_stems_and_patches_their_sum():
    model = shaken(small(**ALIGNED))
    assert isinstance(model.patch_embed.stems[1].layers.inv, Involution2d)
    x = images(3, 1, 12, 12)
    conv, inv = recomputed(model, x)
    tokens = sequence(model, x) - model.pos_embed
    assert tokens.shape == (3, 1 + 2 + 9, 36)
    torch.testing.assert_close(tokens[:, 0], model.cls_token[0].expand(3, -1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tokens[:, 1], conv.mean(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tokens[:, 2], inv.mean(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tokens[:, 3:], conv + inv, rtol=1e-9, atol=1e-9)
    assert (conv.mean(1) - inv.mean(1)).abs().min() > 0


def test_aligned_stems_of_the_paper_have_199_tokens():
    torch.manual_seed(0)
    model = timm.create_model("cit_small_aligned_patch16_224", depth=1, num_classes=2).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = sequence(model, x) - model.pos_embed
        maps = [stem(x).flatten(2) for stem in model.patch_embed.stems]
    assert tokens.shape == (2, 199, 384)
    torch.testing.assert_close(tokens[:, 1], maps[0].mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[:, 2], maps[1].mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[:, 3:], (maps[0] + maps[1]).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_plain_tokens_are_learned():
    model = shaken(small())
    x = images(2, 1, 12, 12)
    tokens = sequence(model, x) - model.pos_embed
    learned = torch.cat([model.cls_token, model.reg_token], dim=1)
    torch.testing.assert_close(tokens[:, :3], learned.expand(2, -1, -1), rtol=1e-10, atol=1e-10)
    cells = F.unfold(x, 4, stride=4)
    patches = (model.patch_embed.proj.weight.flatten(1) @ cells).transpose(1, 2) + model.patch_embed.proj.bias
    torch.testing.assert_close(tokens[:, 3:], patches, rtol=1e-10, atol=1e-10)


def test_learned_tokens_start_as_truncated_gaussians():
    tokens = small(embed_dim=1536)
    for token in (tokens.cls_token, tokens.reg_token[:, :1], tokens.reg_token[:, 1:]):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
    aligned = small(**ALIGNED, embed_dim=1536)
    assert aligned.reg_token is None and aligned.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    weight = aligned.patch_embed.stems[0].layers[3].weight
    assert weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)  # Kaiming


@pytest.mark.parametrize("options", [{}, ALIGNED, {"distill_tokens": 3}, {"stems": ("inv",), "stem_width": 32}])
def test_every_token_has_a_head_and_inference_takes_one_or_the_mean(options):
    model = shaken(small(**options))
    count = options.get("distill_tokens", len(options.get("stems", "ab")))
    x = images(2, 1, 12, 12)
    features = model.forward_features(x)
    heads = [model.head, *model.head_distill]
    expected = [features[:, i] @ head.weight.T + head.bias for i, head in enumerate(heads)]
    assert len(expected) == 1 + count and features.shape[1] == 1 + count + 9
    torch.testing.assert_close(model.token_logits(x), tuple(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    mean = shaken(small(**options, inference="mean"))
    mean.load_state_dict(model.state_dict())
    torch.testing.assert_close(mean(x), sum(expected) / len(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean.token_logits(x), tuple(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean.forward_head(features, pre_logits=True), features[:, : 1 + count].mean(1))
    torch.testing.assert_close(model.train()(x).shape, mean.train()(x).shape)


@pytest.mark.parametrize("options", [{}, ALIGNED])
def test_sizes_other_than_the_first(options):
    model = shaken(small(**options, dynamic_img_size=True))
    resized = shaken(small(**options))
    resized.load_state_dict(model.state_dict())
    resized.set_input_size(img_size=(20, 8))
    assert resized.patch_embed.grid_size == (5, 2) and resized.pos_embed.shape[1] == 3 + 10
    torch.testing.assert_close(resized.pos_embed[:, :3], model.pos_embed[:, :3], rtol=0, atol=0)
    x = images(2, 1, 20, 8)
    fresh = small(**options, img_size=(20, 8)).double().eval()
    fresh.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), fresh(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), resized(x), rtol=1e-10, atol=1e-10)
    square, static = images(2, 1, 12, 12), shaken(small(**options))
    torch.testing.assert_close(model(square), static(square), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, ALIGNED])
def test_weights_of_one_size_load_into_another(options, tmp_path):
    model = shaken(small(**options)).float()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    other = small(**options, img_size=20, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    model.set_input_size(img_size=20)
    x = images(2, 1, 20, 20).float()
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    back = small(**options)
    back.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_padding_to_whole_patches():
    model = shaken(small(**ALIGNED, dynamic_img_size=True, dynamic_img_pad=True))
    x = images(2, 1, 10, 13)
    padded = F.pad(x, (0, 3, 0, 2))
    torch.testing.assert_close(model(x), model(padded), rtol=1e-12, atol=1e-12)
    assert model.patch_embed.dynamic_feat_size((10, 13)) == (3, 4)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_are_those_of_timm(no_embed_class):
    """An aligned model whose stems are replaced by learned tokens is a plain one."""
    options = {"no_embed_class": no_embed_class}
    plain, aligned = shaken(small(**options)), shaken(small(**ALIGNED, **options))
    shared = {k: v for k, v in plain.state_dict().items() if not k.startswith(("patch_embed.", "reg_token"))}
    aligned.load_state_dict(shared, strict=False)

    class Embed(torch.nn.Module):
        def forward(self, x):
            return plain.patch_embed(x).unflatten(1, (3, 3)), plain.reg_token.expand(len(x), -1, -1)

    aligned.patch_embed = Embed()
    x = images(2, 1, 12, 12)
    torch.testing.assert_close(aligned(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, ALIGNED])
def test_features_only_and_intermediates(options):
    model = shaken(small(**options))
    extractor = small(**options, features_only=True, out_indices=(0,)).double().eval()
    drop = ("blocks.1", "norm.", "head")
    extractor.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items() if not k.startswith(drop)})
    assert extractor.feature_info.channels() == [36] and extractor.feature_info.reduction() == [4]
    x = images(2, 1, 12, 12)
    final, maps = model.forward_intermediates(x, indices=[0])
    torch.testing.assert_close(extractor(x), maps)
    torch.testing.assert_close(final, model.forward_features(x))
    tokens = model.blocks[0](sequence(model, x))[:, 3:]
    torch.testing.assert_close(maps[0], tokens.transpose(1, 2).reshape(2, 36, 3, 3))


def test_classifiers_can_be_replaced():
    model = shaken(small())
    x = images(2, 1, 12, 12)
    features = model.forward_features(x)
    assert model.get_classifier() == (model.head, *model.head_distill)
    model.reset_classifier(3)
    assert [tuple(logits.shape) for logits in model.token_logits(x)] == 3 * [(2, 3)]
    torch.testing.assert_close(model(x), features[:, 0] @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model.token_logits(x), tuple(features[:, i] for i in range(3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    with pytest.raises(ValueError, match="global_pool: expected 'token' or '', got 'avg'"):
        model.reset_classifier(3, "avg")
    torch.testing.assert_close(small(num_classes=0, global_pool="").double().eval()(x).shape, features.shape)


def test_no_weight_decay_for_tokens_and_positions():
    model = small()
    free, decayed = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"cls_token", "reg_token", "pos_embed"} <= {names[id(p)] for p in free["params"]}
    assert {"head_distill.0.weight", "patch_embed.proj.weight"} <= {names[id(p)] for p in decayed["params"]}


@pytest.mark.parametrize("options", [{}, ALIGNED])
def test_gradient_checkpointing_keeps_the_gradients(options):
    model = shaken(small(**options, inference="mean")).train()
    x = images(3, 1, 12, 12)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill_tokens": 0}, "distill_tokens: expected at least 1, got 0"),
        ({**ALIGNED, "distill_tokens": 3}, r"distill_tokens: expected one per stem \(2\), got 3"),
        ({"inference": "token"}, "inference: expected 'class' or 'mean', got 'token'"),
        ({"global_pool": "avg"}, "global_pool: expected 'token' in a CiT, got 'avg'"),
        ({"class_token": False}, "class_token: expected True in a CiT"),
        ({"stems": ("conv", "mixer")}, "stems: expected some of conv, inv, got 'mixer'"),
        ({**ALIGNED, "patch_size": 3}, "patch_size: expected even numbers"),
        ({**ALIGNED, "img_size": 14}, r"img_size: expected multiples of patch_size \(4, 4\), got \(14, 14\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_images():
    model = small(**ALIGNED)
    with pytest.raises(ValueError, match=r"x: expected images of \(12, 12\) pixels, got \(16, 12\)"):
        model(torch.zeros(1, 1, 16, 12))
    with pytest.raises(ValueError, match=r"x: expected sides that are multiples of \(4, 4\), got \(12, 10\)"):
        small(**ALIGNED, dynamic_img_size=True)(torch.zeros(1, 1, 12, 10))
    with pytest.raises(ValueError, match=r"patch_size: expected \(4, 4\), fixed in these layers, got \(2, 2\)"):
        model.set_input_size(patch_size=(2, 2))


def test_aligned_tokens_are_exported_for_any_batch():
    model = timm.create_model("cit_small_aligned_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1,
                              num_heads=2).eval()  # fmt: skip
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},)).module()
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(images), model(images), atol=1e-5, rtol=1e-5)
