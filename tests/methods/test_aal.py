"""AAL: Eq. 3 to 6 against hand computations, its decay, its links, its teachers and what is exported."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.methods import get_method
from fastib.methods.aal import AAL, AALOptions, cnn_stages, stage_maps
from fastib.methods.links import write_mask

CLASSES = 5
STUDENT = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES}
STUDENT |= {"embed_dim": 24, "num_heads": 3, "depth": 3}
PIT = {"img_size": 24, "patch_size": 8, "stride": 4, "in_chans": 1, "num_classes": CLASSES}
PIT |= {"base_dims": (8, 8, 8), "depth": (1, 2, 1), "heads": (2, 4, 8)}


def build(dtype=torch.float64, name="vit_tiny_patch16_224", student=None, cnn=None, **options) -> AAL:
    """A student of 3 layers with 3 heads on 4 x 4 patches, and a CNN with 4, 6 and 8 maps of 16, 8 and 4 pixels."""
    torch.manual_seed(0)
    student = timm.create_model(name, **(STUDENT if student is None else student))
    teacher = timm.create_model("digits_cnn", in_chans=1, num_classes=7, widths=(4, 6, 8)) if cnn is None else cnn
    options = AALOptions(**{"teacher": "given"} | options)
    method = AAL(options, student, CLASSES, lambda source: {"given": teacher}[source])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.weight.uniform_(0.5, 2.0)
    return method.to(dtype).train()


def batch(method: AAL, size=4, dtype=torch.float64, soft=False):
    generator = torch.Generator().manual_seed(1)
    side = method.student.patch_embed.img_size[0]
    images = torch.randn(size, 1, side, side, generator=generator, dtype=torch.float64).to(dtype)
    if soft:
        return images, torch.rand(size, CLASSES, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def rows_by_hand(student: nn.Module, images: torch.Tensor, prefix: int, scale=None, over="patches"):
    """Logits and, per layer, softmax(scale q_cls k) written out from the layer's input."""
    inputs = []
    layers = [m for m in student.modules() if hasattr(m, "qkv")]
    handles = [m.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0]))) for m in layers]
    logits = student(images)
    for handle in handles:
        handle.remove()
    maps = []
    for attn, x in inputs:
        q, k, _ = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q[:, :, :1] * k).sum(-1) * (attn.head_dim**-0.5 if scale is None else scale)
        e = scores.exp()
        maps.append(e[..., prefix:] / (e if over == "all" else e[..., prefix:]).sum(-1, keepdim=True))
    return logits, maps


def teacher_maps(method: AAL, images: torch.Tensor) -> list[torch.Tensor]:
    maps = [images]
    for stage in method.frozen["teacher"].stages:
        maps.append(stage(maps[-1]))
    return maps[1:]


def equation_5(weight, bias, attn, maps, grid) -> torch.Tensor:
    """Mean over images, maps and places of squared differences of unit vectors."""
    augmented = torch.einsum("cm,bms->bcs", weight, attn) + bias[:, None]
    target = torch.cat([F.interpolate(m, grid, mode="bicubic", align_corners=False).flatten(2) for m in maps], 1)
    units = [x / x.square().sum(2, keepdim=True).sqrt().clamp(min=1e-12) for x in (augmented, target)]
    return (units[0] - units[1]).square().mean()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    probabilities = targets if targets.dim() == 2 else torch.eye(CLASSES, dtype=logits.dtype)[targets]
    log_softmax = logits - logits.exp().sum(1, keepdim=True).log()
    return -(probabilities * log_softmax).sum(1).mean()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": 1.0}, {"over": "all"}, {"weight": 3.0}])
def test_equation_6(soft, options):
    method = build(**options)
    images, targets = batch(method, soft=soft)
    losses = method(images, targets, 0.0)
    view = {name: options[name] for name in ("scale", "over") if name in options}
    logits, maps = rows_by_hand(method.student, images, 1, **view)
    link = method.groups[0].link
    expected = equation_5(link.weight, link.bias, torch.cat(maps, 1), teacher_maps(method, images), (4, 4))
    assert list(losses) == ["ce", "attention"]
    torch.testing.assert_close(losses["ce"], cross_entropy(logits, targets), rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["attention"], options.get("weight", 2000.0) * expected, rtol=1e-9, atol=0)
    parameters = list(method.parameters())
    total = cross_entropy(logits, targets) + options.get("weight", 2000.0) * expected
    theirs = torch.autograd.grad(total, parameters, allow_unused=True)
    for ours, e in zip(torch.autograd.grad(sum(losses.values()), parameters), theirs, strict=True):
        torch.testing.assert_close(ours, e, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "prefix", "layers"),
    [
        ("deit_tiny_distilled_patch16_224", 2, 3),
        ("vit_small_patch14_reg4_dinov2", 5, 3),
        ("beit_base_patch16_224", 1, 3),
        ("cait_xxs24_224", 1, 2),
    ],
)
def test_students_of_timm(name, prefix, layers):
    """A distillation token, registers, a bias in the attention, a class token that attends in the last layers alone."""
    method = build(name=name)
    images, targets = batch(method)
    attended = [layer for _, layer in method.capture.layers if hasattr(layer, "attn_drop")]
    rows = []
    for layer in attended:
        layer.fused_attn = False
        layer.attn_drop.register_forward_hook(lambda _, args, __: rows.append(args[0][:, :, 0, prefix:]))
    method.student(images)
    for layer in attended:
        layer.fused_attn = True
    maps = torch.cat([row / row.sum(-1, keepdim=True) for row in rows], 1)
    assert maps.shape[1] == 3 * layers == method.groups[0].link.weight.shape[1]
    link = method.groups[0].link
    expected = equation_5(link.weight, link.bias, maps, teacher_maps(method, images), (4, 4))
    torch.testing.assert_close(method(images, targets, 0.0)["attention"], 2000 * expected, rtol=1e-9, atol=0)


def test_pit_has_links_per_grid():
    method = build(name="pit_ti_224", student=PIT)
    images, targets = batch(method)
    _, maps = rows_by_hand(method.student, images, 1)
    assert [tuple(m.shape[1:]) for m in maps] == [(2, 25), (4, 9), (4, 9), (8, 4)]
    assert [tuple(g.link.weight.shape) for g in method.groups] == [(18, 2), (18, 8), (18, 8)]
    assert method.layers.tolist() == [0] * 2 + [1] * 4 + [2] * 4 + [3] * 8
    assert torch.cat([g.columns for g in method.groups]).tolist() == list(range(18))
    stacks = zip((maps[:1], maps[1:3], maps[3:]), ((5, 5), (3, 3), (2, 2)), method.groups, strict=True)
    terms = [
        equation_5(g.link.weight, g.link.bias, torch.cat(stack, 1), teacher_maps(method, images), grid)
        for stack, grid, g in stacks
    ]
    torch.testing.assert_close(method(images, targets, 0.0)["attention"], 2000 * sum(terms) / 3, rtol=1e-9, atol=0)


def test_lambda_decays_at_two_speeds():
    method = build()
    weight, expected = 2000.0, []
    for epoch in range(300):
        expected.append(weight)
        weight *= 0.99 if epoch < 200 else 0.98
    assert [method.weight_at(e / 300) for e in range(300)] == pytest.approx(expected, rel=1e-12)
    assert method.weight_at((100 + 0.999) / 300) == pytest.approx(expected[100], rel=1e-12)
    assert weight == pytest.approx(2000 * 0.99**200 * 0.98**100) and 35 < weight < 36
    method = build(decay=[0.5], decay_epochs=[4], weight=8.0)
    assert [method.weight_at(p) for p in (0, 0.24, 0.25, 0.5, 0.75, 0.99)] == [8, 8, 4, 2, 1, 1]


def test_the_numbers_of_the_paper():
    student = timm.create_model("deit_small_distilled_patch16_224")
    teacher = timm.create_model("efficientnet_b3")
    for links, count in (("full", 68_544), ("alpha", 28_608), ("beta", 23_280)):
        method = AAL(AALOptions(teacher="given", links=links), student, 1000, lambda _: teacher)
        (group,) = method.groups
        assert method.levels.bincount().tolist() == [24, 32, 48, 96, 136, 232, 384] and len(method.levels) == 952
        assert method.layers.bincount().tolist() == [6] * 12
        assert group.link.weight.numel() == 68_544
        assert (group.link.weight.numel() if group.link.mask is None else int(group.link.mask.sum())) == count
    mask = group.link.mask  # beta: level 5 is linked to layers 4 to 7, counted from 1
    rows = mask[(method.levels == 4)]
    assert rows[:, 3 * 6 : 7 * 6].all() and rows.sum() == rows.shape[0] * 24
    parameters = [sum(p.numel() for p in m.parameters()) for m in (student, method.groups, teacher)]
    assert parameters == [22_436_432, 69_496, 12_233_232]


def test_links_that_are_left_out(tmp_path):
    mask = torch.rand(18, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[7] = False  # a map of the CNN without any link
    mask[8] = True
    write_mask(tmp_path / "links.safetensors", mask)
    method = build(links=str(tmp_path / "links.safetensors"))
    images, targets = batch(method)
    (group,) = method.groups
    channels = [c for c in range(18) if mask[c].any()]
    assert group.channels.tolist() == channels and 7 not in channels
    _, maps = rows_by_hand(method.student, images, 1)
    resized = [F.interpolate(m, (4, 4), mode="bicubic") for m in teacher_maps(method, images)]
    target = [torch.cat(resized, 1)[:, channels]]
    expected = equation_5(group.link.weight * mask[channels], group.link.bias, torch.cat(maps, 1), target, (4, 4))
    losses = method(images, targets, 0.0)
    torch.testing.assert_close(losses["attention"], 2000 * expected, rtol=1e-9, atol=0)
    losses["attention"].backward()
    assert group.link.weight.grad[~mask[channels]].eq(0).all() and group.link.weight.grad[mask[channels]].ne(0).all()


def test_masks_of_several_grids(tmp_path):
    mask = torch.zeros(18, 18, dtype=torch.bool)
    mask[:4, :2], mask[10:, 10:] = True, True
    write_mask(tmp_path / "links.safetensors", mask)
    method = build(name="pit_ti_224", student=PIT, links=str(tmp_path / "links.safetensors"))
    images, targets = batch(method)
    _, maps = rows_by_hand(method.student, images, 1)
    levels = teacher_maps(method, images)
    first, last = method.groups  # the second grid has no links at all
    assert first.link.mask is None and tuple(last.link.weight.shape) == (8, 8)
    expected = equation_5(first.link.weight, first.link.bias, maps[0], levels[:1], (5, 5))
    expected = expected + equation_5(last.link.weight, last.link.bias, maps[3], levels[2:], (2, 2))
    torch.testing.assert_close(method(images, targets, 0.0)["attention"], 1000 * expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight", [2000.0, 0.0])
def test_every_parameter_gets_a_gradient(weight):
    method = build(weight=weight)
    images, targets = batch(method)
    losses = method(images, targets, 0.3)
    sum(losses.values()).backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert (losses["attention"].item() == 0) == (weight == 0)


def test_teacher_is_frozen_and_outside_of_the_method():
    method = build()
    teacher = method.frozen["teacher"]
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(method.train().parameters(), lr=1e-3)
    passes = []
    teacher.stages[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    sum(method(*batch(method), 0.0).values()).backward()
    optimizer.step()
    assert passes == [False]
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "groups", "levels", "layers"}
    own = {id(p) for p in method.parameters()}
    assert not any(p.requires_grad or id(p) in own for p in teacher.parameters())


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("test_resnet", ["layer1", "layer2", "layer3", "layer4"]),
        ("test_efficientnet", [f"blocks.{i}" for i in range(5)]),
        ("test_convnext", [f"stages.{i}" for i in range(4)]),
        ("mobilenetv3_small_050", [f"blocks.{i}" for i in range(6)]),
        ("regnetx_002", ["s1", "s2", "s3", "s4"]),
    ],
)
def test_teachers_of_timm(name, modules):
    torch.manual_seed(0)
    teacher = timm.create_model(name).eval()
    expected, calls = {}, []

    def keep(module):
        def hook(_, __, out):
            calls.append(module)
            expected[module] = out

        teacher.get_submodule(module).register_forward_hook(hook)

    for module in modules:
        keep(module)
    images = torch.randn(2, 3, 64, 64)
    maps = stage_maps(teacher, images)
    assert calls == modules and len(maps) == len(modules)
    for module, ours in zip(modules, maps, strict=True):
        torch.testing.assert_close(ours, expected[module], rtol=0, atol=0)
    calls.clear()
    picked = stage_maps(teacher, images, [2, 0])
    assert calls == modules[:3]
    torch.testing.assert_close(picked, [maps[2], maps[0]], rtol=0, atol=0)
    stages = cnn_stages(teacher)
    assert stages is None or len(stages) == len(modules)


def test_teacher_stages_in_any_order():
    method = build(teacher_stages=[2, 0])
    assert method.levels.tolist() == [0] * 8 + [1] * 4
    images, targets = batch(method)
    _, maps = rows_by_hand(method.student, images, 1)
    levels, link = teacher_maps(method, images), method.groups[0].link
    expected = equation_5(link.weight, link.bias, torch.cat(maps, 1), [levels[2], levels[0]], (4, 4))
    torch.testing.assert_close(method(images, targets, 0.0)["attention"], 2000 * expected, rtol=1e-9, atol=0)


def test_losses_stay_float32_under_autocast():
    method = build(torch.float32)
    images, targets = batch(method, dtype=torch.float32)
    exact = method(images, targets, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(images, targets, 0.0)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.testing.assert_close(sum(losses.values()), sum(exact.values()), rtol=0.02, atol=0)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_checkpointing_and_compile_change_nothing():
    method = build()
    images, targets = batch(method)

    def run(f):
        method.zero_grad()
        losses = f(images, targets, 0.3)
        sum(losses.values()).backward()
        return [*losses.values(), *(p.grad for p in method.parameters())]

    expected = run(method)
    method.student.set_grad_checkpointing(True)
    torch.testing.assert_close(run(method), expected, rtol=1e-12, atol=1e-14)
    method.student.set_grad_checkpointing(False)
    torch._dynamo.reset()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(compiled), expected, rtol=1e-9, atol=1e-12)


def test_loss_falls():
    method = build(torch.float32)
    images, targets = batch(method, 16, torch.float32)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    history = {"ce": [], "attention": []}
    for _ in range(15):
        losses = method(images, targets, 0.0)
        for name, loss in losses.items():
            history[name].append(loss.item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(values[-1] < 0.9 * values[0] for values in history.values()), history


def test_exported_student_is_the_student_and_nothing_else():
    method = build()
    images, targets = batch(method)
    sum(method(images, targets, 0.0).values()).backward()
    exported = method.eval().export()
    torch.testing.assert_close(exported(images), method(images), rtol=0, atol=0)
    plain = timm.create_model("vit_tiny_patch16_224", **STUDENT).double()
    plain.load_state_dict(exported.state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(images), method(images), rtol=0, atol=0)
    kinds = [[type(m) for m in model.modules()] for model in (exported, plain)]
    assert kinds[0] == kinds[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in exported.modules())


def test_building_leaves_the_student_in_its_mode():
    student = timm.create_model("vit_tiny_patch16_224", **STUDENT).train()
    student.blocks[0].eval()
    teacher = timm.create_model("digits_cnn", in_chans=1, widths=(4,))
    AAL(AALOptions(teacher="given"), student, CLASSES, lambda _: teacher)
    assert student.training and student.blocks[1].attn.training and not student.blocks[0].attn.training


def test_registered():
    assert get_method("aal") is AAL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": ""}, "teacher: AAL needs a CNN"),
        ({"weight": -1.0}, "weight: expected a number of at least 0, got -1.0"),
        ({"weight": math.nan}, "weight: expected a number of at least 0"),
        ({"decay": []}, "decay: expected one factor per entry of decay_epochs, got 0"),
        ({"decay": [0.9]}, "decay: expected one factor per entry of decay_epochs, got 1"),
        ({"decay": [0.9, -0.1]}, "decay: expected numbers of at least 0, got -0.1"),
        ({"decay_epochs": [10, 0]}, "decay_epochs: expected numbers of at least 1, got 0"),
        ({"links": "alpha"}, "links: alpha is for 7 levels of a CNN and 12 layers, but these are 3 and 3"),
        ({"links": "gamma"}, "links: expected full, alpha, beta or a .safetensors file, got 'gamma'"),
        ({"links": "gone.safetensors"}, r"links: cannot read gone\.safetensors"),
        ({"teacher_stages": [0, 3]}, r"teacher_stages: expected indices in \[0, 2\], got 3"),
        ({"over": "tokens"}, "student: .*over must be 'patches' or 'all'"),
        ({"scale": math.inf}, "student: .*scale must be a finite number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_masks(tmp_path):
    path = tmp_path / "links.safetensors"
    for mask, message in (
        (torch.ones(18, 8, dtype=torch.bool), "is for 18 maps of a CNN and 8 attention maps, but these are 18 and 9"),
        (torch.zeros(18, 9, dtype=torch.bool), "keeps no link at all"),
        (torch.ones(18, 9), "holds no mask"),
    ):
        write_mask(path, mask)
        with pytest.raises(ValueError, match=f"links: {path} {message}"):
            build(links=str(path))


def test_bad_students_and_teachers():
    cnn = timm.create_model("digits_cnn", in_chans=1, widths=(4,))
    with pytest.raises(ValueError, match=r"student: .*model must have a class token; SmallCNN has none"):
        AAL(AALOptions(teacher="given"), cnn, CLASSES, lambda _: cnn)
    with pytest.raises(ValueError, match="teacher: expected a CNN of timm, but Linear has no feature_info"):
        build(cnn=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"teacher: it does not take images of shape \(1, 16, 16\)"):
        build(cnn=timm.create_model("digits_cnn", in_chans=3, widths=(4,)))
