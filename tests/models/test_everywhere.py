"""What PyTorch asks of every model: a program that is exported, saved and loaded, and gradients of single images."""

import pytest
import timm
import torch

import fastib.models  # noqa: F401  (registers the models)

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
NO_DROPOUT = dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), 0.0)
MODELS = {
    "dearkd_tiny_patch16_224": {**VIT, "rpe_drop_rate": 0.0},
    "dhvt_tiny_patch4_32": VIT,
    "cit_tiny_patch16_224": VIT,
    "cit_small_aligned_patch16_224": {**VIT, "stem_width": 32},
    "bootstrap_vit_small_patch16_224": {**VIT, **NO_DROPOUT},
    "agent_cnn_small": {"dim": 18, "depth": 2, "hidden": 36, "patch_size": 4, "drop_rate": 0.0},
    "rednet26": {"layers": (1, 1), "widths": (16, 32)},
    "digits_cnn": {"in_chans": 3, "widths": (4, 6)},
    "digits_inn": {"in_chans": 3, "layers": (1, 1), "widths": (16, 32)},
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **MODELS[name]).double()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_no_family_is_left_out():
    entrypoints = [timm.model_entrypoint(name) for name in timm.list_models()]
    modules = {f.__module__ for f in entrypoints if f.__module__.startswith("fastib.")}
    assert len(modules) == 6 and modules == {timm.model_entrypoint(name).__module__ for name in MODELS}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_exported_saved_and_loaded_for_any_batch(name, training, tmp_path):
    model = build(name).train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = images(5)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-9, atol=1e-9)
    if training:  # the running statistics have moved alike
        buffers = dict(loaded.named_buffers())
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[key], buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_single_images(name):
    model, x = build(name).eval(), images(3)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        exact = torch.autograd.grad(loss(parameters, image), list(parameters.values()), allow_unused=True)
        for (key, parameter), gradient in zip(parameters.items(), exact, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(
                found[key][i], gradient, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
            )
