"""The DearKD models: exact sizes, the position bias in place, and timm's conventions."""

import math

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay

import fastib.models  # noqa: F401  (registers the models)
from fastib.models import DearKDVisionTransformer, distillation_outputs
from fastib.nn import MHCA
from fastib.reference.mhca_attention import position_term

NAMES = {
    "dearkd_tiny_patch16_224": (192, 12),
    "dearkd_small_patch16_224": (384, 12),
    "dearkd_base_patch16_224": (768, 16),
}
DEIT = {192: 5_717_416, 384: 22_050_664, 768: 86_567_656}


def small(**kwargs) -> DearKDVisionTransformer:
    options = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 36, "num_heads": 9}
    options |= {"depth": 3, "mhca_depth": 2, "rpe_drop_rate": 0.0}
    torch.manual_seed(0)
    return timm.create_model("dearkd_tiny_patch16_224", **{**options, **kwargs})


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved off its initial value, so that no term vanishes; float64, evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().eval()


def images(*size: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deit_parameters(dim: int, depth: int = 12, patches: int = 196, patch: int = 16, classes: int = 1000) -> int:
    embedding = 3 * patch**2 * dim + dim + dim + (patches + 1) * dim
    block = 2 * 2 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim
    return embedding + depth * block + 2 * dim + (dim + 1) * classes


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_is_that_of_deit_and_of_eight_position_biases(name):
    dim, heads = NAMES[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert deit_parameters(dim) == DEIT[dim]
    assert sum(p.numel() for p in model.parameters()) == DEIT[dim] + 8 * (heads + 2 * heads)
    assert [isinstance(block.attn, MHCA) for block in model.blocks] == 8 * [True] + 4 * [False]
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and model.pretrained_cfg["architecture"] == name


def test_defaults_of_the_paper():
    with torch.device("meta"):
        model = timm.create_model("dearkd_tiny_patch16_224")
        assert timm.create_model("dearkd_tiny_patch16_224", depth=6).mhca_depth == 4
    attention = model.blocks[0].attn
    assert attention.rpe_drop.p == 0.1 and attention.num_prefix_tokens == 1 and tuple(attention.grid_size) == (14, 14)


def attention_maps(model: DearKDVisionTransformer, block: int) -> torch.Tensor:
    """(H, N, N) attention of a block whose queries and keys are 0: what the position bias alone does.

    The values of every head are one-hot in the token, so the output is the attention matrix itself; head_dim must be N.
    """
    attention = model.blocks[block].attn
    heads, tokens = attention.num_heads, attention.qkv.in_features // attention.num_heads
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.weight[-heads * tokens :] = torch.eye(heads * tokens)
        attention.proj.weight.copy_(torch.eye(heads * tokens))
        attention.qkv.bias.zero_()
        attention.proj.bias.zero_()
        one_hot = torch.eye(tokens, dtype=attention.qkv.weight.dtype).repeat(1, heads)[None]
        return attention(one_hot)[0].view(tokens, heads, tokens).transpose(0, 1)


def test_attention_without_content_peaks_at_the_center_and_the_class_token_has_no_position():
    grid = (3, 4)
    model = small(img_size=(12, 16), embed_dim=9 * 13).double().eval()
    attention = model.blocks[1].attn
    torch.manual_seed(3)
    with torch.no_grad():
        attention.alpha.copy_(torch.rand(9) + 0.5)
    maps = attention_maps(model, 1)
    alpha, center = attention.alpha.detach(), attention.center.detach()
    for head in range(9):
        for i in range(12):
            row, column = i // 4 + center[head, 0], i % 4 + center[head, 1]
            scores = torch.zeros(13, dtype=torch.float64)
            for j in range(12):
                # -alpha |d - center|^2 + alpha |center|^2, whose maximum over the plane is at d = center
                distance = (j // 4 - row) ** 2 + (j % 4 - column) ** 2
                scores[1 + j] = alpha[head] * (center[head].square().sum() - distance)
            torch.testing.assert_close(maps[head, 1 + i], scores.softmax(0), rtol=1e-10, atol=1e-12)
            if 0 <= row < grid[0] and 0 <= column < grid[1] and row == row.round() and column == column.round():
                assert maps[head, 1 + i, 1:].argmax() == row * 4 + column
                assert maps[head, 1 + i].argmax() - 1 == row * 4 + column or center[head].eq(0).all()
        torch.testing.assert_close(maps[head, 0], torch.full((13,), 1 / 13, dtype=torch.float64))
        diagonal = maps[head].diagonal()
        torch.testing.assert_close(maps[head, :, 0], diagonal, rtol=1e-10, atol=0)  # b is 0 for the class and for d = 0
    bias = position_term(alpha, center, grid, 1)
    assert bias[:, 0].abs().max() == 0 and bias[:, :, 0].abs().max() == 0


def test_centers_start_on_a_grid_of_neighbours():
    attention = small().blocks[0].attn
    assert sorted(map(tuple, attention.center.tolist())) == [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
    assert (attention.alpha > 0).all()


def test_weights_can_be_initialised_anew():
    model = shaken(small())
    torch.manual_seed(4)
    model.init_weights()
    fresh = small().double()
    for name, parameter in model.named_parameters():
        if name.endswith((".alpha", ".center")):
            torch.testing.assert_close(parameter, fresh.get_parameter(name), rtol=0, atol=0)
    assert 0.01 < model.blocks[0].attn.qkv.weight.std() < 0.03 and model.blocks[0].attn.qkv.bias.abs().max() == 0


def test_alpha_zero_is_the_plain_vision_transformer():
    model = shaken(small())
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=12, patch_size=4, in_chans=1, num_classes=5, embed_dim=36, num_heads=9, depth=3
    ).double()
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith((".alpha", ".center"))}
    plain.load_state_dict(weights)
    x = images(3, 1, 12, 12)
    assert not torch.allclose(model(x), plain.eval()(x), rtol=1e-3)
    with torch.no_grad():
        for block in model.blocks[:2]:
            block.attn.alpha.zero_()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {
            "img_size": 32,
            "patch_size": 4,
            "in_chans": 3,
            "embed_dim": 48,
            "num_heads": 12,
            "depth": 4,
            "mhca_depth": None,
        },
        {"img_size": 8, "patch_size": 2},
        {"img_size": 8, "patch_size": 1},
        {"img_size": (8, 16), "patch_size": 4},
        {"img_size": (8, 12), "patch_size": (4, 2)},
        {"mhca_depth": 0},
        {"mhca_depth": 3, "reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_any_size_equals_a_float64_recomputation_of_its_blocks(options):
    model = shaken(small(**options))
    size = model.patch_embed.img_size
    x = images(2, model.in_chans, *size)
    tokens = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        attention, y = block.attn, block.norm1(tokens)
        batch, length, dim = y.shape
        heads = attention.num_heads
        q, k, v = (
            (y @ attention.qkv.weight.T + attention.qkv.bias).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(dim // heads)
        if isinstance(attention, MHCA):
            grid = model.patch_embed.grid_size
            scores = scores + position_term(attention.alpha, attention.center, grid, model.num_prefix_tokens)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim)
        tokens = tokens + y @ attention.proj.weight.T + attention.proj.bias
        tokens = tokens + block.mlp(block.norm2(tokens))
    pooled = tokens[:, model.num_prefix_tokens :].mean(1) if model.global_pool == "avg" else tokens[:, 0]
    expected = model.head(model.fc_norm(model.norm(tokens)[:, 0] if model.global_pool == "token" else pooled))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_input_size_moves_the_patch_grid_of_the_bias():
    model = shaken(small(dynamic_img_size=True))
    resized = shaken(small())
    resized.load_state_dict(model.state_dict())
    resized.set_input_size(img_size=(20, 8))
    assert all(block.attn.grid_size == (5, 2) for block in resized.blocks[:2])
    x = images(2, 1, 20, 8)
    fresh = small(img_size=(20, 8)).double().eval()
    fresh.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), fresh(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), resized(x), rtol=1e-10, atol=1e-10)
    square = images(2, 1, 12, 12)
    static = shaken(small())
    torch.testing.assert_close(model(square), static(square), rtol=1e-12, atol=1e-12)


def test_distillation_outputs_are_those_of_separate_passes():
    model = shaken(small())
    x = images(3, 1, 12, 12)
    passes = []
    handle = model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    logits, pooled, tokens = distillation_outputs(model, x, [2, 0, 2])
    handle.remove()
    assert len(passes) == 1 and list(tokens) == [0, 2]
    torch.testing.assert_close(logits, model(x), rtol=1e-12, atol=1e-12)
    normalised = model.forward_features(x)[:, 1:]
    torch.testing.assert_close(pooled, model.head(normalised.mean(1)), rtol=1e-12, atol=1e-12)
    expected = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    torch.testing.assert_close(tokens[0], expected[:, 1:], rtol=1e-12, atol=1e-12)
    last = model.blocks[2](model.blocks[1](expected))
    torch.testing.assert_close(tokens[2], last[:, 1:], rtol=1e-12, atol=1e-12)
    again = distillation_outputs(model, x)
    torch.testing.assert_close(again[:2], (logits, pooled), rtol=1e-12, atol=1e-12)
    assert again[2] == {}


def test_features_only_and_intermediates():
    model = shaken(small())
    extractor = small(features_only=True, out_indices=(0, 1)).double().eval()
    weights = {
        f"model.{k}": v for k, v in model.state_dict().items() if not k.startswith(("blocks.2", "norm.", "head."))
    }
    extractor.load_state_dict(weights)
    assert extractor.feature_info.channels() == [36, 36] and extractor.feature_info.reduction() == [4, 4]
    x = images(2, 1, 12, 12)
    final, maps = model.forward_intermediates(x, indices=[0, 1])
    torch.testing.assert_close(extractor(x), maps)
    torch.testing.assert_close(final, model.forward_features(x))
    assert maps[0].shape == (2, 36, 3, 3)


def test_classifier_can_be_replaced():
    model = shaken(small())
    x = images(2, 1, 12, 12)
    features = model.forward_features(x)
    assert model.get_classifier() is model.head
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    model.reset_classifier(3)
    torch.testing.assert_close(model(x), features[:, 0] @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


def test_no_weight_decay_for_embeddings_and_the_position_bias():
    model = small()
    names = model.no_weight_decay()
    bias = {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("alpha", "center")}
    assert {"pos_embed", "cls_token"} | bias <= names
    free, decayed = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=names)
    by_id = {id(p): name for name, p in model.named_parameters()}
    assert free["weight_decay"] == 0 and bias <= {by_id[id(p)] for p in free["params"]}
    assert not any(
        name.endswith(("alpha", "center", "pos_embed", "cls_token"))
        for name in (by_id[id(p)] for p in decayed["params"])
    )


@pytest.mark.parametrize("rpe_drop", [0.0, 0.3])
def test_gradient_checkpointing_keeps_the_gradients(rpe_drop):
    model = shaken(small(rpe_drop_rate=rpe_drop)).train()
    x = images(2, 1, 12, 12)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_position_dropout_acts_in_training_only():
    model = shaken(small(rpe_drop_rate=0.5))
    x = images(1, 1, 12, 12)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(x), model(x))
    torch.manual_seed(7)
    first = model(x)
    torch.manual_seed(7)
    torch.testing.assert_close(model(x), first, rtol=0, atol=0)


def test_weights_survive_safetensors(tmp_path):
    model = shaken(small())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = small().double().eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = images(2, 1, 12, 12)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"mhca_depth: expected a number in \[0, 3\], got 4"):
        small(mhca_depth=4)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        small(patch_drop_rate=0.1)
