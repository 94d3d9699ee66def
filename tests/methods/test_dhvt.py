"""DHVT: its loss, its analysis and its recipes."""

from dataclasses import asdict

import pytest
import timm
import torch
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.methods import get_method
from fastib.methods.dhvt import DHVTMethod, DHVTOptions, analyze_head_tokens, head_token_maps
from fastib.train.config import load_config

STUDENT = {"img_size": (12, 16), "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "num_heads": 3,
           "depth": 3}  # fmt: skip


def student(name="dhvt_tiny_patch4_32", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**STUDENT, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def images(count=4):
    return torch.randn(count, 1, 12, 16, generator=torch.Generator().manual_seed(1))


def test_trains_on_labels_alone():
    method = DHVTMethod(DHVTOptions(), student(), 5, None).train()
    x, targets = images(), torch.tensor([0, 3, 1, 1])
    losses = method.losses(x, targets, 0.0)
    assert list(losses) == ["ce"]
    logits = method.student(x).log_softmax(1)
    torch.testing.assert_close(losses["ce"], -logits[torch.arange(4), targets].mean(), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = method.losses(x, targets, 0.0)["ce"]
        loss.backward()
        optimizer.step()
    assert loss < losses["ce"] / 2
    assert method.export() is method.student and get_method("dhvt") is DHVTMethod


def test_wants_head_tokens():
    with pytest.raises(ValueError, match=r"student: expected a model with head tokens, .* got VisionTransformer"):
        DHVTMethod(DHVTOptions(), timm.create_model("vit_tiny_patch16_224", **STUDENT), 5, None)


def test_synchronised_norms_are_those_of_the_embedding():
    method = DHVTMethod(DHVTOptions(sync_norms=True), student(), 5, None).eval()
    synced = [name for name, m in method.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert synced == [f"student.patch_embed.sope.stages.{i}.1" for i in range(2)]
    torch.testing.assert_close(method.student(images()), student().eval()(images()), rtol=1e-5, atol=1e-6)


def test_maps_are_the_rows_of_the_head_tokens():
    """Layer 2, by hand: what enters it, the sequence with its head tokens, the softmax over all of it."""
    model, x = student().eval(), images()
    tokens = torch.cat([model.cls_token.expand(4, -1, -1), model.patch_embed(x)], 1)
    y = model.blocks[1].norm1(model.blocks[0](tokens))
    attn = model.blocks[1].attn
    sequence = torch.cat([y, attn.head_tokens(y)], 1)
    q, k, _ = F.linear(sequence, attn.qkv.weight, attn.qkv.bias).view(4, 16, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 13:, :13].transpose(1, 2)
    torch.testing.assert_close(head_token_maps(model, x, 2), expected, rtol=1e-4, atol=1e-6)


def test_analysis(tmp_path):
    model = student().eval()

    def pick(count):
        return images(count), images(count).sigmoid()

    analysis = analyze_head_tokens({}, tmp_path, layer=3, count=2, head=1, student=model, images=pick)
    assert analysis.files == [tmp_path / "head_tokens.png"]
    assert (tmp_path / "head_tokens.png").read_bytes().startswith(b"\x89PNG")
    ((title, rows),) = analysis.tables.items()
    assert title == "attention of the head tokens, layer 3, head 1, 2 images" and len(rows) == 3
    maps = head_token_maps(model, images(2), 3)[:, :, 0]
    row = rows["head token 2"]
    shares = maps[:, 1, 1:].sum(1).mean(), maps[:, 1, 0].mean(), 1 - maps[:, 1].sum(1).mean()
    found = [row[name] for name in ("to the patches", "to the class token", "to the head tokens")]
    assert found == pytest.approx([float(share) for share in shares], abs=1e-6)
    spread = maps[:, 1, 1:] / maps[:, 1, 1:].sum(1, keepdim=True)
    assert row["patches it spreads over"] == pytest.approx((-(spread * spread.log()).sum(1)).exp().mean().item(), 1e-5)
    cosines = [F.cosine_similarity(maps[:, 1, 1:], maps[:, t, 1:]).mean().item() for t in (0, 2)]
    assert row["cosine with the others"] == pytest.approx(sum(cosines) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, r"layer: expected a number in \[1, 3\], got 4"),
        ({"layer": "two"}, "layer: expected a number, got 'two'"),
        ({"head": 0}, r"head: expected a number in \[1, 3\], got 0"),
        ({"count": 0}, "count: expected a number of at least 1, got 0"),
    ],
)
def test_errors_of_the_analysis(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        analyze_head_tokens({}, tmp_path, **options, student=student().eval(), images=lambda n: (images(n), images(n)))


def test_cifar_recipe_has_the_numbers_of_the_paper():
    config = load_config("dhvt", "cifar100", data="anywhere")
    data, augment = config.data, config.data.augment
    assert config.model.name == "dhvt_tiny_patch4_32" and config.model.kwargs == {"drop_path_rate": 0.1}
    assert (data.name, data.path, data.batch_size, data.img_size) == ("cifar100", "anywhere", 512, 32)
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == ("adamw", 1e-3, 0.05)
    schedule = config.sched
    assert (schedule.sched, schedule.warmup_epochs, schedule.min_lr, schedule.warmup_lr) == ("cosine", 5, 1e-5, 1e-6)
    assert (config.epochs, config.ema.decay, config.clip_grad) == (300, 0, None)
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.reprob, augment.smoothing, augment.repeats, augment.crop_padding) == (0.25, 0.1, 3, 4)


def test_digits_recipe_is_the_plain_one_but_for_architecture_and_mixing():
    ours, plain = load_config("dhvt", "digits"), load_config("plain", "digits")
    for part in ("optim", "sched", "ema"):
        assert asdict(getattr(ours, part)) == asdict(getattr(plain, part))
    data, other = asdict(ours.data), asdict(plain.data)
    assert (data["augment"].pop("mixup"), data["augment"].pop("cutmix")) == (0.8, 1.0)
    del other["augment"]["mixup"], other["augment"]["cutmix"]
    assert data == other and ours.clip_grad == plain.clip_grad
    assert ours.model.kwargs.items() <= plain.model.kwargs.items()
