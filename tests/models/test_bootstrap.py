"""ViTs and agent CNNs of Bootstrapping ViTs: exact sizes, blocks by definition, shared weights, timm's conventions."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.models import AgentCNN, agent_for
from fastib.models.agent_cnn import TapConv2d, describe_agent
from fastib.reference.generalized_conv import generalized_conv_ref, taps

VITS = {
    ("small", 10): 6_276_394, ("small", 100): 6_302_404, ("small", 1000): 6_562_504,
    ("base", 10): 21_669_514, ("base", 100): 21_704_164, ("base", 1000): 22_050_664,
}  # fmt: skip
AGENTS = {
    ("small", "base", 10): 8_702_506, ("small", "base", 100): 8_728_516,
    ("small", "res", 10): 8_656_746, ("small", "res", 100): 8_682_756,
    ("base", "base", 10): 25_118_602, ("base", "base", 100): 25_153_252,
    ("base", "res", 10): 25_054_410, ("base", "res", 100): 25_089_060,
}  # fmt: skip
PAPER = {"small": {"down_sample": (0, 1)}, "base": {"pre_norm": False}}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 4, "num_heads": 6, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


def shaken(model: nn.Module) -> nn.Module:
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


@pytest.mark.parametrize(("size", "classes"), VITS)
def test_parameter_counts_of_vits(size, classes):
    with torch.device("meta"):
        model = timm.create_model(f"bootstrap_vit_{size}_patch16_224", num_classes=classes)
    assert count(model) == VITS[size, classes]


@pytest.mark.parametrize(("size", "form", "classes"), AGENTS)
def test_parameter_counts_of_agents(size, form, classes):
    model = timm.create_model(f"agent_cnn_{size}", form=form, num_classes=classes)
    assert count(model) == AGENTS[size, form, classes]
    with torch.device("meta"):
        student = timm.create_model(f"bootstrap_vit_{size}_patch16_224", num_classes=classes)
        same = agent_for(student, form=form, **({} if form == "base" and size == "small" else PAPER[size]))
    assert count(same) == AGENTS[size, form, classes]


@pytest.mark.parametrize(("size", "private"), [("small", 212_100), ("base", 288_804)])
def test_parameter_counts_of_shared_agents(size, private):
    with torch.device("meta"):
        student = timm.create_model(f"bootstrap_vit_{size}_patch16_224", num_classes=100)
        assert count(agent_for(student, shared=True, **PAPER[size])) == private


def test_settings_of_the_paper():
    small = timm.create_model("bootstrap_vit_small_patch16_224")
    assert (small.pos_drop.p, small.blocks[0].attn.attn_drop.p, small.blocks[0].mlp.drop1.p) == (0.1, 0.1, 0.1)
    assert small.blocks[0].norm1.eps == 1e-5
    base = timm.create_model("bootstrap_vit_base_patch16_224")
    assert base.pos_drop.p == base.blocks[0].attn.proj_drop.p == 0.0 and base.blocks[0].norm1.eps == 1e-6
    bound = (6 / (288 + 864)) ** 0.5
    assert 0.99 * bound < small.blocks[0].attn.qkv.weight.abs().max() <= bound
    assert small.blocks[0].mlp.fc1.bias.abs().max() < 1e-5 and not small.blocks[0].attn.qkv.bias.any()
    agent = timm.create_model("agent_cnn_small")
    assert (agent.blocks[0].mlp.drop.p, agent.blocks[0].proj_drop.p) == (0.1, 0.0)
    shared = agent_for(small, shared=True)
    assert (shared.blocks[0].drop, shared.blocks[0].proj_drop.p) == (0.1, 0.1)


@pytest.mark.parametrize(("name", "options", "sides"), [
    ("agent_cnn_small", {}, [28, 14, 7, 7, 7, 7]), ("agent_cnn_small", {"form": "base"}, [14] * 6),
    ("agent_cnn_base", {}, [28] * 3 + [14] * 6 + [7] * 3),
])  # fmt: skip
def test_sides_of_the_maps(name, options, sides):
    model = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        last, maps = model.forward_intermediates(torch.zeros(1, 3, 224, 224))
    assert [m.shape[2] for m in maps] == sides and last.shape[2] == sides[-1]
    assert [224 // info["reduction"] for info in model.feature_info] == sides
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9, 12, 16])
def test_tap_convolution_is_its_definition(count):
    torch.manual_seed(0)
    conv, x = TapConv2d(5, count, dtype=torch.float64), images(2, 5, 6, 7)
    expected = conv.bias[:, None, None].expand(2, -1, 6, 7).clone()
    for tap, (down, right) in enumerate(taps(count)):
        for i, j in torch.cartesian_prod(torch.arange(6), torch.arange(7)).tolist():
            if 0 <= i + down < 6 and 0 <= j + right < 7:
                expected[:, :, i, j] += x[:, :, i + down, j + right] @ conv.weight[:, :, tap].T
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["base", "res"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_shared_agent_is_its_definition(form, pre_norm):
    """Each block by hand from the ViT's tensors: W_O W_V of each head as a tap, b_O alone, the MLP as 1 x 1 layers."""
    student = vit()
    agent = agent_for(student, shared=True, form=form, pre_norm=pre_norm)
    shaken(student), shaken(agent)
    x = images(2, 3, 16, 16)
    if form == "base":
        y = agent.stem.conv1(x)
    else:
        y = agent.stem.conv2(F.gelu(agent.stem.norm(agent.stem.conv1(x))))
    for i, (mine, theirs) in enumerate(zip(agent.blocks, student.blocks, strict=True)):

        def conv(z, theirs=theirs):
            attn = theirs.attn
            return generalized_conv_ref(z, attn.qkv.weight[48:], attn.proj.weight, attn.proj.bias, 6)

        def mlp(z, theirs=theirs):
            weights = [theirs.mlp.fc1.weight[:, :, None, None], theirs.mlp.fc2.weight[:, :, None, None]]
            return F.conv2d(F.gelu(F.conv2d(z, weights[0], theirs.mlp.fc1.bias)), weights[1], theirs.mlp.fc2.bias)

        for part, norm in ((conv, mine.norm1), (mlp, mine.norm2)):
            y = y + (part(norm(y)) if pre_norm else norm(part(y)))
        if i in agent.down_sample:
            y = F.avg_pool2d(y, 2)
    expected = agent.head(F.gelu(agent.norm(y)).mean((2, 3)))
    torch.testing.assert_close(agent(x), expected, rtol=1e-9, atol=1e-9)


def test_own_weights_of_an_agent():
    """With W_O W_V of each head as its taps and the ViT's MLPs, the agent with weights of its own is the shared one."""
    student = vit()
    shared, own = agent_for(student, shared=True), agent_for(student)
    shaken(student), shaken(shared)
    own.double().eval().load_state_dict({**own.state_dict(), **shared.state_dict()})
    with torch.no_grad():
        for mine, theirs in zip(own.blocks, student.blocks, strict=True):
            w_v, w_o = theirs.attn.qkv.weight[48:].unflatten(0, (6, 4)), theirs.attn.proj.weight.unflatten(1, (6, 4))
            mine.conv.weight.copy_(torch.einsum("ohd,hdc->och", w_o, w_v))
            mine.conv.bias.copy_(theirs.attn.proj.bias)
            for name in ("fc1", "fc2"):
                getattr(mine.mlp, name).load_state_dict(getattr(theirs.mlp, name).state_dict())
    torch.testing.assert_close(own(images(2, 3, 16, 16)), shared(images(2, 3, 16, 16)), rtol=1e-9, atol=1e-9)


def test_shared_tensors_are_the_vits_own(tmp_path):
    """No copy: they move with the ViT, are stored once, and a copy of both keeps them together."""
    student = vit()
    agent = agent_for(student, shared=True)
    both = nn.ModuleDict({"vit": student, "agent": agent})
    assert not any("conv" in name or "mlp" in name for name, _ in agent.named_parameters() if "stem" not in name)
    memory = {p.untyped_storage().data_ptr() for p in both.state_dict().values()}
    assert len(memory) == len(both.state_dict())
    weights = agent.blocks[0].weights
    assert weights.read(1, "w_v").data_ptr() == student.blocks[1].attn.qkv.weight[48:].data_ptr()
    assert (
        weights.read(1, "w_2") is not None
        and weights.read(1, "w_2").data_ptr() == student.blocks[1].mlp.fc2.weight.data_ptr()
    )

    x = images(2, 3, 16, 16).float()
    both.eval()
    save_file(both.state_dict(), tmp_path / "both.safetensors")
    expected = agent(x)
    student.load_state_dict({name: torch.zeros_like(value) for name, value in student.state_dict().items()})
    assert not torch.equal(agent(x), expected)
    both.load_state_dict(load_file(tmp_path / "both.safetensors"))
    assert torch.equal(agent(x), expected)
    twin = copy.deepcopy(both)
    assert torch.equal(twin["agent"](x), expected)
    with torch.no_grad():
        twin["vit"].blocks[0].mlp.fc1.weight.zero_()
    assert not torch.equal(twin["agent"](x), expected) and torch.equal(agent(x), expected)
    assert both.double() is both and agent(x.double()).dtype == torch.float64


def test_agents_of_other_vits():
    for name, options in {
        "deit_tiny_distilled_patch16_224": {}, "dearkd_tiny_patch16_224": {"mhca_depth": 0},
        "vit_base_patch16_224": {"embed_dim": 48, "depth": 4, "num_heads": 12}, "cit_tiny_patch16_224": {"depth": 2},
    }.items():  # fmt: skip
        student = timm.create_model(name, img_size=32, num_classes=3, **options)
        for shared in (False, True):
            agent = agent_for(student, shared=shared).eval()
            assert agent(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert describe_agent(vit(depth=12))["down_sample"] == (2, 8) and describe_agent(vit(), "base")["down_sample"] == ()


def test_errors():
    for name, options in {"resnet18": {}, "pit_ti_224": {}, "eva02_tiny_patch14_224": {}}.items():
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        with pytest.raises(ValueError, match=r"vit: expected a timm ViT whose blocks have attn\.qkv"):
            agent_for(model)
    with pytest.raises(ValueError, match="patch_size: a res-like agent needs 2, 4, 8 or 16, got 14"):
        agent_for(vit(img_size=28, patch_size=14))
    with pytest.raises(ValueError, match=r"form: expected 'base' or 'res', got 'big'"):
        agent_for(vit(), form="big")
    with pytest.raises(ValueError, match=r"down_sample: expected blocks in \[0, 3\], got \(4,\)"):
        agent_for(vit(), down_sample=(4,))


def test_behaves_as_a_timm_model():
    model = timm.create_model("agent_cnn_small", num_classes=7, in_chans=1, dim=36, depth=4, hidden=72, patch_size=4)
    x = torch.randn(2, 1, 32, 32)
    assert isinstance(model, AgentCNN) and model(x).shape == (2, 7) and model.num_classes == 7
    model.eval()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x)) and model.forward_head(features, True).shape == (2, 36)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == 3
    maps = timm.create_model("agent_cnn_small", features_only=True, out_indices=(0, 3), dim=36, hidden=72, depth=4)
    assert [m.shape[1] for m in maps(torch.randn(1, 3, 64, 64))] == [36, 36]
    student = timm.create_model("bootstrap_vit_small_patch16_224", img_size=32, embed_dim=36, num_classes=4, depth=1)
    assert student(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert student.no_weight_decay() >= {"pos_embed", "cls_token"}


def test_agents_may_leave_the_map_unpooled():
    agent = timm.create_model("agent_cnn_small", num_classes=0, global_pool="").eval()
    pooled = timm.create_model("agent_cnn_small", num_classes=0).eval()
    pooled.load_state_dict(agent.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(agent(images).mean((2, 3)), pooled(images))


def test_agents_pool_as_they_are_told():
    agent = timm.create_model("agent_cnn_small", depth=2, num_classes=0, global_pool="max").double().eval()
    x = images(2, 3, 64, 64)
    maps = torch.nn.functional.gelu(agent.norm(agent.forward_features(x)))
    torch.testing.assert_close(agent(x), maps.amax((2, 3)))
    agent.reset_classifier(5, "catavgmax")
    pooled = torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), 1)
    torch.testing.assert_close(agent(x), agent.head(pooled))
    assert (
        agent.head_hidden_size == 2 * agent.num_features == agent.forward_head(agent.forward_features(x), True).shape[1]
    )
    with pytest.raises(AssertionError, match="Invalid pool type: token"):  # timm's own
        timm.create_model("agent_cnn_small", depth=2, global_pool="token")


def test_an_agent_of_a_hybrid_is_refused():
    with pytest.raises(ValueError, match="vit: an agent needs patches of the image, not of a map as in HybridEmbed"):
        agent_for(timm.create_model("vit_tiny_r_s16_p8_224"))
