"""The DHVT models: exact sizes, what each part does in the whole, published weights, and timm's conventions."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.models import DHVT, convert_published_dhvt
from fastib.nn import DAFF, HeadTokenAttention

SIZES = [
    ("dhvt_tiny_patch4_32", {}, 100, 6_008_650),
    ("dhvt_small_patch4_32", {}, 100, 23_425_450),
    ("dhvt_tiny_patch2_32", {}, 100, 5_845_162),
    ("dhvt_small_patch2_32", {}, 100, 22_766_698),
    ("dhvt_tiny_patch16_224", {"num_classes": 345, "num_heads": 4}, 345, 6_105_975),
    ("dhvt_small_patch16_224", {"num_classes": 345}, 345, 23_788_431),
    ("dhvt_tiny_patch16_224", {}, 1000, 6_267_334),
    ("dhvt_small_patch16_224", {}, 1000, 24_040_606),
]


def small(**kwargs) -> DHVT:
    options = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "num_heads": 3}
    torch.manual_seed(0)
    return timm.create_model("dhvt_tiny_patch16_224", **{**options, "depth": 2, **kwargs})


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


@pytest.mark.parametrize(("name", "options", "classes", "count"), SIZES)
def test_parameter_counts(name, options, classes, count):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.num_classes == classes and model.pos_embed is None
    assert model.pretrained_cfg["input_size"][1] == int(name.rpartition("_")[2])
    assert model.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize(("name", "tokens"), [("dhvt_tiny_patch4_32", 65), ("dhvt_tiny_patch2_32", 257)])
def test_images_of_the_paper(name, tokens):
    model = timm.create_model(name, depth=1).eval()
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, tokens, 192)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


@pytest.mark.parametrize("size", [(12, 12), (8, 20)])
def test_the_whole_from_its_parts(size):
    """Class token, SOPE's tokens, pre-norm blocks of attention and DAFF, norm, head on its row; no positions."""
    model, x = shaken(small(img_size=size)), images(3, 1, *size)
    tokens = model.patch_embed.sope(x).flatten(1, 2)
    y = torch.cat([model.cls_token.expand(3, -1, -1), tokens], 1)
    for block in model.blocks:
        assert isinstance(block.attn, HeadTokenAttention) and isinstance(block.mlp, DAFF)
        assert block.mlp.grid_size == (size[0] // 4, size[1] // 4)
        y = y + block.attn(F.layer_norm(y, (24,), block.norm1.weight, block.norm1.bias, 1e-6))
        y = y + block.mlp(F.layer_norm(y, (24,), block.norm2.weight, block.norm2.bias, 1e-6))
    y = F.layer_norm(y, (24,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), y[:, 0] @ model.head.weight.T + model.head.bias, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.forward_head(y, pre_logits=True), y[:, 0])


def test_parts_can_be_timms():
    """Without all three, and with positions, it is timm's vision transformer (the baseline of Tables 5 and 6)."""
    options = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "num_heads": 3}
    plain = shaken(timm.create_model("vit_tiny_patch16_224", depth=2, **options))
    ours = small(head_tokens=False, sope=False, daff=False, pos_embed="learn").double().eval()
    ours.load_state_dict(plain.state_dict())
    x = images(2, 1, 12, 12)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)
    for part in ("head_tokens", "sope", "daff"):
        model = shaken(small(**{part: False}))
        assert model(x).isfinite().all() and sum(p.numel() for p in model.parameters()) != sum(
            p.numel() for p in small().parameters()
        )


def test_initial_weights():
    model = small(embed_dim=768, num_heads=12, depth=1)
    block = model.blocks[0]
    for weight in (model.cls_token, block.attn.head_embed, block.attn.qkv.weight, block.mlp.reduce.weight,
                   model.head.weight):  # fmt: skip
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head.bias.any() and not block.attn.proj.bias.any() and not block.mlp.expand.bias.any()
    bound = 1 / 768**0.5  # PyTorch's own, for convolutions
    assert block.mlp.conv1.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
    with torch.device("meta"):
        late = small()
    late = late.to_empty(device="cpu")
    late.init_weights()
    assert late(torch.zeros(1, 1, 12, 12)).isfinite().all()
    assert late.blocks[0].attn.head_embed.abs().max() <= 0.04 * 2 and late.patch_embed.sope.pre.alpha.item() == 1


@pytest.mark.parametrize("pad", [False, True])
def test_sizes_other_than_the_first(pad):
    model = shaken(small(dynamic_img_size=True, dynamic_img_pad=pad))
    resized = shaken(small())
    resized.load_state_dict(model.state_dict())
    resized.set_input_size(img_size=(20, 8))
    x = images(2, 1, 20, 8)
    fresh = small(img_size=(20, 8)).double().eval()
    fresh.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), fresh(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), resized(x), rtol=1e-12, atol=1e-12)
    square, static = images(2, 1, 12, 12), shaken(small())
    torch.testing.assert_close(model(square), static(square), rtol=1e-12, atol=1e-12)
    if pad:
        odd = images(2, 1, 10, 13)
        torch.testing.assert_close(model(odd), model(F.pad(odd, (0, 3, 0, 2))), rtol=1e-12, atol=1e-12)


def test_features_only_and_intermediates():
    model = shaken(small(img_size=(8, 20)))
    extractor = small(img_size=(8, 20), features_only=True, out_indices=(0,)).double().eval()
    drop = ("blocks.1", "norm.", "head")
    extractor.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items() if not k.startswith(drop)})
    assert extractor.feature_info.channels() == [24] and extractor.feature_info.reduction() == [4]
    x = images(2, 1, 8, 20)
    final, maps = model.forward_intermediates(x, indices=[0])
    torch.testing.assert_close(extractor(x), maps)
    torch.testing.assert_close(final, model.forward_features(x))
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(x)], 1)
    torch.testing.assert_close(maps[0], model.blocks[0](tokens)[:, 1:].transpose(1, 2).reshape(2, 24, 2, 5))


def test_classifiers_can_be_replaced():
    model, x = shaken(small()), images(2, 1, 12, 12)
    features = model.forward_features(x)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    torch.testing.assert_close(model(x), features[:, 0] @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features[:, 0])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), features[:, 1:].mean(1))


def test_weight_decay_is_that_of_the_published_code():
    """Of the embeddings the class token alone is spared; affine maps and head embeddings are not one-dimensional."""
    model = small()
    free, decayed = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    free, decayed = ({names[id(p)] for p in group["params"]} for group in (free, decayed))
    assert {"cls_token", "blocks.0.mlp.norm1.weight", "blocks.0.attn.head_norm.weight", "head.bias"} <= free
    assert {"patch_embed.sope.pre.alpha", "patch_embed.sope.post.beta", "blocks.1.attn.head_embed"} <= decayed


def test_gradient_checkpointing_keeps_the_gradients():
    model, x = shaken(small(img_size=(8, 20))).train(), images(3, 1, 8, 20)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


def published_names(depth: int) -> list[str]:
    """Keys of the published code's DHVT with patches of 4, in its own order."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["cls_token"]
    for place in (0, 2):
        names += [f"patch_embed.proj.{place}.0.weight", *(f"patch_embed.proj.{place}.1.{n}" for n in norm)]
    names += [f"patch_embed.{affine}.{n}" for affine in ("pre_affine", "post_affine") for n in ("alpha", "beta")]
    for i in range(depth):
        layers = ["norm1", "attn.qkv", "attn.proj", "attn.ht_proj", "attn.ht_norm", "norm2", "mlp.conv1", "mlp.conv2",
                  "mlp.conv3", "mlp.compress", "mlp.excitation"]  # fmt: skip
        names += [f"blocks.{i}.attn.pos_embed"]
        names += [f"blocks.{i}.{layer}.{n}" for layer in layers for n in ("weight", "bias")]
        names += [f"blocks.{i}.mlp.bn{k}.{n}" for k in (1, 2, 3) for n in norm]
    return [*names, "norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights(prefix, tmp_path):
    """Every name finds its place: the converted keys are exactly the model's, and a checkpoint file loads."""
    model = shaken(small(img_size=12)).float()
    ours = model.state_dict()
    converted = convert_published_dhvt({"model": {prefix + name: torch.tensor(i) for i, name in enumerate(
        published_names(2))}})  # fmt: skip
    assert converted.keys() == ours.keys()
    back = dict(zip(converted, published_names(2), strict=True))
    pairs = {
        "patch_embed.sope.stages.1.0.weight": "patch_embed.proj.2.0.weight",
        "patch_embed.sope.stages.0.1.running_var": "patch_embed.proj.0.1.running_var",
        "patch_embed.sope.post.alpha": "patch_embed.post_affine.alpha",
        "blocks.1.attn.head_embed": "blocks.1.attn.pos_embed",
        "blocks.1.attn.head_norm.bias": "blocks.1.attn.ht_norm.bias",
        "blocks.0.mlp.norm2.running_mean": "blocks.0.mlp.bn2.running_mean",
        "blocks.0.mlp.expand.weight": "blocks.0.mlp.excitation.weight",
    }
    assert pairs.items() <= back.items()
    save_file({back[name]: tensor for name, tensor in ours.items()}, tmp_path / "published.safetensors")
    overlay = {"file": str(tmp_path / "published.safetensors"), "num_classes": 5, "input_size": (1, 12, 12)}
    loaded = small(pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = images(2, 1, 12, 12).float()
    assert torch.equal(loaded(x), model(x))


def test_weights_of_three_channels_load_into_others(tmp_path):
    """Gray images are images of three equal channels, where the affine map treats these alike."""
    model = shaken(small(in_chans=3)).float()
    with torch.no_grad():
        model.patch_embed.sope.pre.alpha.fill_(1.5)
        model.patch_embed.sope.pre.beta.fill_(0.25)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5, "input_size": (3, 12, 12)}
    gray = small(pretrained=True, pretrained_cfg_overlay=overlay).double().eval()
    x = images(2, 1, 12, 12)
    torch.testing.assert_close(gray(x), model.double()(x.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    five = small(in_chans=5, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(five.patch_embed.sope.pre.alpha, torch.full((1, 5, 1, 1), 1.5))


@pytest.mark.parametrize("key", ["blocks.0.mlp.fc1.weight", "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.x"])
def test_unknown_published_keys(key):
    with pytest.raises(ValueError, match=f"expected keys of a published DHVT, got '{key}'"):
        convert_published_dhvt({key: torch.zeros(1)})


def test_weights_survive_safetensors(tmp_path):
    model, x = shaken(small()).float(), images(2, 1, 12, 12).float()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = small().eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": False}, "class_token: expected True in a DHVT, got False"),
        ({"reg_tokens": 2}, "reg_tokens: expected 0 in a DHVT, got 2"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate: expected 0.0 in a DHVT, got 0.1"),
        ({"qk_norm": True}, "qk_norm: expected False in a DHVT"),
        ({"patch_size": 3}, "patch_size must be a power of 2 above 1, got 3"),
        ({"patch_size": (2, 4)}, r"patch_size: expected a square, got \(2, 4\)"),
        ({"img_size": 14}, r"img_size: expected multiples of patch_size \(4, 4\), got \(14, 14\)"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads, got dim=24, num_heads=5"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_images():
    model = small()
    with pytest.raises(ValueError, match=r"x: expected images of \(12, 12\) pixels, got \(16, 12\)"):
        model(torch.zeros(1, 1, 16, 12))
    with pytest.raises(ValueError, match=r"patch_size: expected \(4, 4\), fixed in these layers, got \(2, 2\)"):
        model.set_input_size(patch_size=(2, 2))
