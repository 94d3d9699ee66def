"""MHCA and apply_mhca: how they start, what they compute, and which models they take."""

import copy
import math

import pytest
import timm
import torch
from helpers import max_error
from timm.layers import Attention

import fastib
from fastib.nn import MHCA, apply_mhca
from fastib.ops import mhca_attention
from fastib.reference.mhca_attention import position_term

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit(name="vit_tiny_patch16_224", **options):
    """A small model with weights large enough for its attention to matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**OPTIONS, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def without_position(model):
    for module in model.modules():
        if isinstance(module, MHCA):
            module.alpha.data.zero_()
    return model


def test_starts_as_a_convolution():
    """12 heads: a 3 x 3 window around the patch, row-major, and three wide heads in its middle."""
    module = MHCA(24, 12, (5, 6))
    assert module.center[:9].tolist() == [[r, c] for r in (-1, 0, 1) for c in (-1, 0, 1)]
    assert not module.center[9:].any()
    assert torch.equal(module.alpha[:9], torch.ones(9)) and torch.allclose(module.alpha[9:], torch.full((3,), 1 / 9))
    module = MHCA(32, 16, 4, locality_strength=2.0)
    assert module.center[:6].tolist() == [
        [-1.5, -1.5],
        [-1.5, -0.5],
        [-1.5, 0.5],
        [-1.5, 1.5],
        [-0.5, -1.5],
        [-0.5, -0.5],
    ]
    assert torch.equal(module.alpha, torch.full((16,), 2.0))
    assert MHCA(8, 1).center.tolist() == [[0.0, 0.0]]


def test_attention_peaks_at_center():
    module = MHCA(18, 9, (5, 5))
    term = position_term(module.alpha, module.center, (5, 5))[:, 1 + 12, 1:].reshape(9, 5, 5)
    peaks = term.flatten(1).argmax(1)
    assert [(p // 5 - 2, p % 5 - 2) for p in peaks.tolist()] == [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_forward_and_gradients(backend):
    """The module is projection, operator, projection; in float64 against the parts written out."""
    torch.manual_seed(0)
    module = MHCA(24, 4, (3, 5), num_prefix_tokens=2, rpe_drop=0.0, backend=backend, dtype=torch.float64)
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).reshape(2, 17, 3, 4, 6).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(6) + position_term(module.alpha, module.center, (3, 5), 2)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 17, 24) @ module.proj.weight.T + module.proj.bias
    weights = [x, *module.parameters()]
    actual = module(x)
    assert max_error(actual, expected) < 1e-13
    for a, b in zip(
        torch.autograd.grad(actual.sin().sum(), weights),
        torch.autograd.grad(expected.sin().sum(), weights),
        strict=True,
    ):
        assert max_error(a, b) < 1e-12


def test_dropout_is_for_training_only():
    module = MHCA(24, 4, 4, rpe_drop=0.5, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 17, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    module.rpe_drop.train()
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_module(dtype):
    module = MHCA(24, 4, 4, rpe_drop=0.0).to(dtype)
    x = torch.randn(2, 17, 24, dtype=dtype, requires_grad=True)
    module(x).sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in (*module.parameters(), x))


def test_device_and_dtype_arguments():
    module = MHCA(24, 4, 4, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    module = module.to_empty(device="cpu")
    module.reset_position()
    assert torch.equal(module.alpha, torch.ones(4, dtype=torch.bfloat16))


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim=10, num_heads=4"):
        MHCA(10, 4)
    module = MHCA(24, 4, (3, 4))
    with pytest.raises(ValueError, match=r"x must have 1 \+ 3 x 4 tokens, got N=17; set grid_size"):
        module(torch.randn(1, 17, 24))
    with pytest.raises(ValueError, match=r"got N=12"):
        MHCA(24, 4, 4)(torch.randn(1, 12, 24))
    with pytest.raises(ValueError, match="attn_mask must be None"):
        module(torch.randn(1, 13, 24), attn_mask=torch.zeros(13, 13))
    with pytest.raises(ValueError, match="is_causal False"):
        module(torch.randn(1, 13, 24), is_causal=True)


def test_takes_any_square():
    module = MHCA(24, 4, (4, 4), rpe_drop=0.0)
    x = torch.randn(1, 1 + 36, 24)
    actual = module(x)
    module.grid_size = (6, 6)
    assert torch.equal(actual, module(x))
    module.grid_size = (4, 9)
    assert not torch.equal(actual, module(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"img_size": (24, 40)}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}),
        ("vit_tiny_patch16_224", {"qkv_bias": False, "drop_path_rate": 0.1}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_converted_model(name, options):
    """Same weights under the same names; with alpha = 0 the same function, with alpha > 0 another."""
    model = vit(name, **options)
    x = images(*options.get("img_size", (32, 32)))
    before, parameters, expected = copy.deepcopy(model.state_dict()), dict(model.named_parameters()), model(x)
    assert apply_mhca(model, blocks=(0, 2)) is model
    assert [isinstance(block.attn, MHCA) for block in model.blocks] == [True, False, True]
    assert all(dict(model.named_parameters())[key] is value for key, value in parameters.items())
    new = {f"blocks.{block}.attn.{part}" for block in (0, 2) for part in ("alpha", "center")}
    assert set(model.state_dict()) - set(before) == new
    assert model.load_state_dict(before, strict=False).missing_keys == sorted(new, key=list(model.state_dict()).index)
    assert not model.training and not model.blocks[0].attn.training
    assert model.blocks[0].attn.num_prefix_tokens == model.num_prefix_tokens
    assert max_error(model(x), expected) > 1e-2
    assert max_error(without_position(model)(x), expected) < 1e-5 * expected.abs().max()


def test_alpha_zero_is_the_same_bit_for_bit():
    """Both in plain PyTorch: the position term adds nothing at all."""
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = model(images())
    apply_mhca(model, range(3), backend="reference")
    assert torch.equal(without_position(model)(images()), expected)


def test_timm_options_stay():
    """What Attention can do beyond the plain case is taken along: another width, a gate, a norm of the result."""
    torch.manual_seed(0)
    options = {
        "attn_head_dim": 10,
        "gated": True,
        "qk_norm": True,
        "scale_norm": True,
        "norm_layer": torch.nn.LayerNorm,
    }
    model = vit()
    model.blocks[1].attn = Attention(36, 3, **options, attn_drop=0.1, proj_drop=0.2).eval()
    expected = model(images())
    apply_mhca(model, [1], rpe_drop=0.3)
    attn = model.blocks[1].attn
    assert (attn.attn_drop.p, attn.proj_drop.p, attn.rpe_drop.p) == (0.1, 0.2, 0.3)
    assert max_error(without_position(model)(images()), expected) < 1e-5 * expected.abs().max()


def test_default_blocks_and_top_level_name():
    model = fastib.apply_mhca(vit(depth=9))
    assert [isinstance(block.attn, MHCA) for block in model.blocks] == [True] * 8 + [False]


def test_converted_model_trains():
    """Gradient checkpointing changes nothing, and every parameter gets a gradient.

    The class token sees no positions, so those of the last block are learned only where patches are read too.
    """
    model = apply_mhca(vit(global_pool="avg"), range(3)).train()
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(p.grad.any() for name, p in model.named_parameters() if "attn" in name and "qkv.bias" not in name)


def test_dynamic_image_size():
    model = apply_mhca(vit(dynamic_img_size=True), range(3))
    expected = without_position(copy.deepcopy(model))(images(48, 48))
    plain = vit(dynamic_img_size=True)
    assert max_error(expected, plain(images(48, 48))) < 1e-5 * expected.abs().max()
    assert model(images(48, 48)).isfinite().all()
    with pytest.raises(ValueError, match="set grid_size where the patch grid has changed"):
        model(images(32, 48))


def test_compiles():
    model = apply_mhca(vit(), range(3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert max_error(compiled(images()), model(images())) < 1e-4


def test_meta_model():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    apply_mhca(model)
    assert all(p.is_meta for p in model.parameters())


def test_draws_no_random_numbers():
    model = vit()
    state = torch.get_rng_state()
    apply_mhca(model, range(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "model must have its transformer layers in `blocks`; ResNet does not"),
        (
            "swin_tiny_patch4_window7_224",
            "model must have its transformer layers in `blocks`; SwinTransformer does not",
        ),
        (
            "beit_base_patch16_224",
            "block 0 of Beit cannot be converted: Attention also has .*`relative_position_bias_table`",
        ),
        ("eva02_tiny_patch14_224", "block 0 of Eva cannot be converted: EvaAttention also has .*`rope`"),
        ("cait_xxs24_224", "block 0 of Cait cannot be converted: TalkingHeadAttn also has `proj_l`, `proj_w`"),
        ("vit_relpos_small_patch16_224", ".*RelPosAttention also has `rel_pos`, `shared_rel_pos`"),
        ("convit_tiny", "block 0 of ConVit cannot be converted: GPSA has no packed `qkv` and `proj`"),
        ("xcit_nano_12_p16_224", "grid_size must be given; Xcit does not tell it"),
        ("samvit_base_patch16", "num_prefix_tokens must be given; VisionTransformerSAM does not tell it"),
        ("vit_dpwee_patch16_reg1_gap_256", "block 0 of VisionTransformer cannot be converted: it has no `attn`"),
    ],
)
def test_models_that_cannot_be_converted(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="^apply_mhca: " + message):
        apply_mhca(model)


def test_conversion_errors_change_nothing():
    model = vit()
    with pytest.raises(ValueError, match=r"apply_mhca: blocks must be indices such as range\(8\), got 1$"):
        apply_mhca(model, 1)
    with pytest.raises(ValueError, match=r"blocks must be in 0 ... 2 for VisionTransformer, got 3"):
        apply_mhca(model, (0, 3))
    with pytest.raises(ValueError, match="got -1"):
        apply_mhca(model, [-1])
    with pytest.raises(ValueError, match="must keep all patches; build it with patch_drop_rate=0"):
        apply_mhca(vit(patch_drop_rate=0.5), [0])
    assert not any(isinstance(module, MHCA) for module in model.modules())
    apply_mhca(model, [0])
    with pytest.raises(ValueError, match="block 0 of VisionTransformer cannot be converted: it is MHCA already"):
        apply_mhca(model, [0])


def test_operator_result_needs_no_copy():
    """The projection reads the operator's result in place: (B, H, N, D) is stored as (B, N, H * D)."""
    q, k, v = torch.randn(2, 17, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    out = mhca_attention(q, k, v, torch.ones(4), torch.zeros(4, 2), 4)
    assert out.transpose(1, 2).reshape(2, 17, 24).data_ptr() == out.data_ptr()
