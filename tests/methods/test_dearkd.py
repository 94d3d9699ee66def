"""DearKD: the losses of Eq. 4 to 7 against hand computations, what gets gradients, and what is exported."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.methods import get_method
from fastib.methods.dearkd import DearKD, DearKDOptions
from fastib.nn.aligner import Aligner

CLASSES = 5
STUDENT = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES, "embed_dim": 36, "num_heads": 9}
STUDENT |= {"depth": 3, "mhca_depth": 2, "rpe_drop_rate": 0.0}


def build(dtype=torch.float64, teacher_name="digits_cnn", teacher_options=None, **options) -> DearKD:
    """A small student of 3 blocks (2 with MHCA) on 3 x 3 patches, and a teacher with maps of 12, 6 and 3 pixels."""
    torch.manual_seed(0)
    student = timm.create_model("dearkd_tiny_patch16_224", **STUDENT)
    if teacher_options is None:
        teacher_options = {"widths": (4, 6, 8)}
    teacher = timm.create_model(teacher_name, in_chans=1, num_classes=CLASSES, **teacher_options)
    options = {"teacher": "given", "student_blocks": [0, 1], "teacher_stages": [0, 1]} | options
    method = DearKD(DearKDOptions(**options), student, CLASSES, lambda source: {"given": teacher}[source])
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return method.to(dtype).train()


def batch(size=4, dtype=torch.float64, soft=False):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    if soft:
        return images, torch.rand(size, CLASSES, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of -sum_c p_c log softmax(logits)_c."""
    probabilities = targets if targets.dim() == 2 else torch.eye(CLASSES, dtype=logits.dtype)[targets]
    log_softmax = logits - logits.exp().sum(1, keepdim=True).log()
    return -(probabilities * log_softmax).sum(1).mean()


def by_hand(method: DearKD, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The three terms of Eq. 6 without their weights, each from its own forward pass."""
    student, teacher = method.student, method.frozen["teacher"]
    features = student.forward_features(images)
    cls = cross_entropy(student.head(features[:, 0]), targets)
    distill = cross_entropy(student.head(features[:, 1:].mean(1)), teacher(images).argmax(1))
    x, tokens = student._pos_embed(student.patch_embed(images)), []
    for block in student.blocks:
        x = block(x)
        tokens.append(x[:, 1:])
    maps = [images]
    for stage in teacher.stages:
        maps.append(stage(maps[-1]))
    options = method.options
    hidden = [
        (aligner(tokens[block], (3, 3), maps[1 + stage].shape[-2:]) - maps[1 + stage]).square().mean()
        for aligner, block, stage in zip(method.aligners, options.student_blocks, options.teacher_stages, strict=True)
    ]
    return cls, distill, sum(hidden) / len(hidden)


@pytest.mark.parametrize("soft", [False, True])
def test_stage_one_is_equation_6(soft):
    method = build(alpha=0.3, beta=2.5)
    images, targets = batch(soft=soft)
    losses = method(images, targets, 0.0)
    cls, distill, hidden = by_hand(method, images, targets)
    assert list(losses) == ["cls", "distill", "hidden"]
    torch.testing.assert_close(losses["cls"], 0.3 * cls, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["distill"], 0.7 * distill, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["hidden"], 2.5 * hidden, rtol=1e-9, atol=0)
    torch.testing.assert_close(sum(losses.values()), 0.3 * cls + 0.7 * distill + 2.5 * hidden, rtol=1e-9, atol=0)


def test_pairs_may_repeat_and_come_in_any_order():
    method = build(student_blocks=[2, 0, 0], teacher_stages=[0, 2, 1])
    images, targets = batch()
    torch.testing.assert_close(
        method(images, targets, 0.0)["hidden"], by_hand(method, images, targets)[2], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("soft", [False, True])
def test_stage_two_is_equation_7(soft):
    method = build(stage_one_share=0.5)
    images, targets = batch(soft=soft)
    passes = []
    method.frozen["teacher"].stages[0].register_forward_hook(lambda *_: passes.append(1))
    assert "distill" in method(images, targets, 0.4999) and len(passes) == 1
    losses = method(images, targets, 0.5)
    assert len(passes) == 1
    cls = cross_entropy(method.student(images), targets)
    torch.testing.assert_close(losses["cls"], cls, rtol=1e-9, atol=0)
    torch.testing.assert_close(sum(losses.values()), cls, rtol=1e-9, atol=0)


def test_ramp_is_equation_6_without_beta_and_with_alpha_rising_to_1():
    method = build(alpha=0.4, stage_one_share=0.5, stage_two="ramp")
    images, targets = batch()
    cls, distill, hidden = by_hand(method, images, targets)
    total = sum(method(images, targets, 0.4999).values())
    torch.testing.assert_close(total, 0.4 * cls + 0.6 * distill + hidden, rtol=1e-9, atol=0)
    for progress, alpha in ((0.5, 0.4), (0.75, 0.7), (1.0, 1.0)):
        assert method.alpha_at(progress) == pytest.approx(alpha, rel=1e-12)
        losses = method(images, targets, progress)
        torch.testing.assert_close(losses["cls"], alpha * cls, rtol=1e-9, atol=0)
        torch.testing.assert_close(losses["distill"], (1 - alpha) * distill, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(sum(losses.values()), alpha * cls + (1 - alpha) * distill, rtol=1e-9, atol=0)


def test_stages_switch_at_250_of_300_epochs_by_default():
    method = build()
    assert DearKDOptions().stage_one_share == 250 / 300
    images, targets = batch()
    steps = [len(method(images, targets, epoch / 300)) for epoch in (0, 249, 250, 299)]
    assert steps == [3, 3, 2, 2]
    assert [method.alpha_at(epoch / 300) for epoch in (0, 249, 250)] == [0.5, 0.5, 1.0]


def test_beta_zero_needs_no_aligner():
    method = build(beta=0.0, student_blocks=[], teacher_stages=[])
    images, targets = batch()
    assert len(method.aligners) == 0 and list(method(images, targets, 0.0)) == ["cls", "distill"]
    assert list(method(images, targets, 0.9)) == ["cls"]


def bilinear(size: int, out: int) -> torch.Tensor:
    """(out, size) weights of bilinear interpolation between pixel centres, clamped at the border."""
    weights = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        position = max((i + 0.5) * size / out - 0.5, 0.0)
        low = min(math.floor(position), size - 1)
        high, share = min(low + 1, size - 1), position - low
        weights[i, low] += 1 - share
        weights[i, high] += share
    return weights


@pytest.mark.parametrize(("grid", "out", "kernel"), [((3, 4), (7, 5), 3), ((4, 4), (2, 2), 3), ((3, 2), (3, 2), 5)])
def test_aligner_equals_its_definition(grid, out, kernel):
    torch.manual_seed(0)
    aligner = Aligner(6, 10, kernel_size=kernel, dtype=torch.float64)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.normal_()
    tokens = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    maps = tokens.view(2, *grid, 6)
    maps = torch.einsum("yr,xc,brcd->bdyx", bilinear(grid[0], out[0]), bilinear(grid[1], out[1]), maps)
    half = kernel // 2
    padded = F.pad(maps, (half, half, half, half))
    convolved = aligner.depthwise.bias[:, None, None] + sum(
        aligner.depthwise.weight[:, 0, i, j, None, None] * padded[:, :, i : i + out[0], j : j + out[1]]
        for i in range(kernel)
        for j in range(kernel)
    )
    mixed = torch.einsum("od,bdyx->boyx", aligner.pointwise.weight, convolved)
    mixed = mixed + aligner.pointwise.bias[:, None, None]
    mean, var = mixed.mean(1, keepdim=True), mixed.var(1, unbiased=False, keepdim=True)
    normed = (mixed - mean) / (var + aligner.norm.eps).sqrt()
    expected = (normed * aligner.norm.weight[:, None, None] + aligner.norm.bias[:, None, None]).clamp(min=0)
    torch.testing.assert_close(aligner(tokens, grid, out), expected, rtol=1e-10, atol=1e-10)


def test_aligner_refuses_bad_input():
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 2"):
        Aligner(4, 8, kernel_size=2)
    with pytest.raises(ValueError, match="tokens: expected 2 x 3 of them, got 5"):
        Aligner(4, 8)(torch.randn(1, 5, 4), (2, 3), (4, 4))


def test_hidden_loss_reaches_the_early_blocks_and_the_aligners_alone():
    method = build()
    method(*batch(), 0.0)["hidden"].backward()
    early = [p for block in method.student.blocks[:2] for p in block.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*early, *method.aligners.parameters()])
    late = [
        *method.student.blocks[2].parameters(),
        *method.student.head.parameters(),
        *method.student.norm.parameters(),
    ]
    assert all(p.grad is None for p in late)


def test_hidden_gradient_of_the_position_bias_equals_finite_differences():
    method = build()
    images, targets = batch()
    parameters = [method.student.blocks[0].attn.alpha, method.student.blocks[0].attn.center]
    gradients = torch.autograd.grad(method(images, targets, 0.0)["hidden"], parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            values = []
            for step in (1e-5, -2e-5):
                parameter.view(-1)[4] += step
                values.append(method(images, targets, 0.0)["hidden"])
            parameter.view(-1)[4] += 1e-5
            torch.testing.assert_close(gradient.view(-1)[4], (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("stage_two", ["ce", "ramp"])
@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_every_parameter_gets_a_gradient_in_every_stage(stage_two, progress):
    method = build(stage_two=stage_two)
    sum(method(*batch(), progress).values()).backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_teacher_is_frozen_and_outside_of_the_method():
    method = build()
    teacher = method.frozen["teacher"]
    before = copy.deepcopy(teacher.state_dict())
    method.train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for progress in (0.0, 0.9):
        sum(method(*batch(), progress).values()).backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    own = {id(p) for p in method.parameters()}
    assert not any(id(p) in own for p in teacher.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "aligners"}
    method.float()
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_one_pass_through_the_teacher():
    method = build(stage_two="ramp")
    passes = []
    method.frozen["teacher"].stages[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for count, progress in ((1, 0.0), (2, 0.9)):
        method(*batch(), progress)
        assert passes == count * [False]


@pytest.mark.parametrize(
    ("name", "stages"), [("test_resnet", [1, 2]), ("test_efficientnet", [1, 3]), ("test_convnext", [0, 1])]
)
def test_teachers_of_timm(name, stages):
    method = build(teacher_name=name, teacher_options={}, teacher_stages=stages)
    images, targets = batch()
    images = F.interpolate(images, size=32)
    method.student.set_input_size((32, 32))
    losses = method.train()(images, targets, 0.0)
    teacher = method.frozen["teacher"]
    torch.testing.assert_close(
        losses["distill"], 0.5 * cross_entropy(pooled_logits(method.student, images), teacher(images).argmax(1))
    )
    _, tokens = method.student.forward_intermediates(images, indices=[0, 1], output_fmt="NLC")
    maps = teacher.forward_intermediates(images, indices=stages, intermediates_only=True)
    hidden = [
        F.mse_loss(aligner(x, (8, 8), y.shape[-2:]), y)
        for aligner, x, y in zip(method.aligners, tokens, maps, strict=True)
    ]
    torch.testing.assert_close(losses["hidden"], sum(hidden) / 2)


def pooled_logits(student: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return student.head(student.forward_features(images)[:, 1:].mean(1))


def test_any_vision_transformer_of_timm_can_be_the_student():
    torch.manual_seed(0)
    student = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=12,
        patch_size=4,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=36,
        num_heads=3,
        depth=2,
    )
    teacher = timm.create_model("digits_cnn", in_chans=1, num_classes=CLASSES, widths=(4, 6))
    options = DearKDOptions(teacher="given", student_blocks=[0, 1], teacher_stages=[0, 1])
    method = DearKD(options, student, CLASSES, lambda _: teacher).double()
    images, targets = batch()
    expected = by_hand(method, images, targets)
    losses = method(images, targets, 0.0)
    torch.testing.assert_close(sum(losses.values()), 0.5 * expected[0] + 0.5 * expected[1] + expected[2])


def test_losses_stay_float32_under_autocast():
    method = build(dtype=torch.float32)
    images, targets = batch(dtype=torch.float32)
    exact = method(images, targets, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(images, targets, 0.0)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.testing.assert_close(sum(losses.values()), sum(exact.values()), rtol=0.05, atol=0.05)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_loss_falls():
    method = build(dtype=torch.float32)
    images, targets = batch(16, torch.float32)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    history = {"cls": [], "distill": [], "hidden": []}
    for _ in range(12):
        losses = method(images, targets, 0.0)
        for name, loss in losses.items():
            history[name].append(loss.item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(values[-1] < 0.9 * values[0] for values in history.values()), history


def test_exported_student_is_the_student_and_nothing_else():
    method = build().eval()
    exported = method.export()
    images, _ = batch()
    torch.testing.assert_close(exported(images), method(images), rtol=0, atol=0)
    plain = timm.create_model("dearkd_tiny_patch16_224", **STUDENT).double()
    plain.load_state_dict(exported.state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(images), method(images), rtol=0, atol=0)
    assert not any(isinstance(module, Aligner) for module in exported.modules())


def test_registered():
    assert get_method("dearkd") is DearKD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": ""}, "teacher: DearKD needs a CNN"),
        ({"alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
        ({"stage_one_share": -0.1}, "stage_one_share: expected"),
        ({"beta": -1.0}, "beta: expected a number of at least 0"),
        ({"beta": float("nan")}, "beta: expected a number of at least 0"),
        ({"stage_two": "none"}, "stage_two: expected 'ce' or 'ramp', got 'none'"),
        ({"student_blocks": [0]}, r"teacher_stages: expected one per student block \(1\), got 2"),
        ({"student_blocks": [], "teacher_stages": []}, "student_blocks: expected at least one"),
        ({"student_blocks": [0, 3]}, r"student_blocks: expected indices in \[0, 2\], got 3"),
        ({"teacher_stages": [0, 3]}, r"teacher_stages: expected indices in \[0, 2\], got 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_students_and_teachers():
    teacher = timm.create_model("digits_cnn", in_chans=1, num_classes=CLASSES, widths=(4, 6, 8))
    student = build().student
    options = DearKDOptions(teacher="given", student_blocks=[0], teacher_stages=[0])
    with pytest.raises(ValueError, match="student: expected a timm VisionTransformer with a class token, got SmallCNN"):
        DearKD(options, teacher, CLASSES, lambda _: teacher)
    with pytest.raises(ValueError, match="teacher: expected 7 classes, got 5"):
        DearKD(options, student, 7, lambda _: teacher)
    with pytest.raises(ValueError, match="teacher: expected a timm model, but Linear has no feature_info"):
        DearKD(options, student, CLASSES, lambda _: nn.Linear(2, 2))
