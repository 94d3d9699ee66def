"""Co-advise: Eq. 1 against a hand computation, its gradient, which token answers to which teacher, what is exported."""

import copy
import math

import pytest
import timm
import torch
from timm.models import is_model
from torch import nn

import fastib.models  # noqa: F401  (registers the models)
from fastib.methods import get_method
from fastib.methods.co_advise import CoAdvise, CoAdviseOptions, divergence
from fastib.train.config import load_config

CLASSES = 5
STUDENT = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES, "embed_dim": 24, "num_heads": 3}
STUDENT |= {"depth": 2}
TEACHERS = {"cnn": ("digits_cnn", {"widths": (4, 6)}), "inn": ("digits_inn", {"layers": (1,), "widths": (16,)}),
            "third": ("test_resnet", {})}  # fmt: skip


def teacher(source: str) -> nn.Module:
    name, options = TEACHERS[source]
    torch.manual_seed(3)
    model = timm.create_model(name, in_chans=1, num_classes=CLASSES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.requires_grad_(False).eval()


def build(dtype=torch.float64, student=None, student_options=None, **options) -> CoAdvise:
    """A small CiT of 2 blocks on 3 x 3 patches, with a CNN and an involution network as teachers."""
    torch.manual_seed(0)
    options = {"teachers": ["cnn", "inn"]} | options
    if student is None:
        tokens = {"distill_tokens": len(options["teachers"])}
        student = timm.create_model("cit_tiny_patch16_224", **STUDENT, **(tokens | (student_options or {})))
    method = CoAdvise(CoAdviseOptions(**options), student, CLASSES, teacher)
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


def softmax(logits: list[float], tau: float = 1.0) -> list[float]:
    weights = [math.exp(z / tau) for z in logits]
    return [w / sum(weights) for w in weights]


def kl(student: torch.Tensor, target: torch.Tensor, tau: float) -> float:
    """Mean over the batch of sum_c p_t log(p_t / p_s), with the teacher as the target p_t, in Python floats."""
    total = 0.0
    for z_s, z_t in zip(student.tolist(), target.tolist(), strict=True):
        p_s, p_t = softmax(z_s, tau), softmax(z_t, tau)
        total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    return total / len(student)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    probabilities = targets if targets.dim() == 2 else torch.eye(CLASSES, dtype=torch.float64)[targets]
    rows = zip(logits.tolist(), probabilities.tolist(), strict=True)
    return -sum(p * math.log(s) for z, y in rows for s, p in zip(softmax(z), y, strict=True)) / len(logits)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_losses_are_equation_1(soft, aligned):
    stems = {"stems": ("conv", "inv"), "stem_width": 32} if aligned else {}
    method = build(lambdas=[0.5, 0.8, 0.3], taus=[2.0, 0.7], student_options=stems)
    images, targets = batch(soft=soft)
    losses = method(images, targets, 0.5)
    features = method.student.forward_features(images)
    heads = [method.student.head, *method.student.head_distill]
    tokens = [features[:, i] @ head.weight.T + head.bias for i, head in enumerate(heads)]
    teachers = [method.frozen["teacher_1"](images), method.frozen["teacher_2"](images)]
    assert list(losses) == ["cls", "distill_1", "distill_2"]
    assert losses["cls"].item() == pytest.approx(0.5 * cross_entropy(tokens[0], targets), rel=1e-9)
    assert losses["distill_1"].item() == pytest.approx(0.8 * 4.0 * kl(tokens[1], teachers[0], 2.0), rel=1e-9)
    assert losses["distill_2"].item() == pytest.approx(0.3 * 0.49 * kl(tokens[2], teachers[1], 0.7), rel=1e-9)


def test_lambdas_and_taus_of_the_paper_are_the_defaults():
    method, explicit = build(), build(lambdas=[1.0, 1.0, 1.0], taus=[1.0, 1.0])
    images, targets = batch()
    torch.testing.assert_close(method(images, targets), explicit(images, targets), rtol=0, atol=0)
    assert method.lambdas == [1.0, 1.0, 1.0] and method.taus == [1.0, 1.0]


def test_the_teacher_is_the_target_of_the_divergence():
    torch.manual_seed(0)
    student, target = torch.randn(2, 3, CLASSES, dtype=torch.float64)
    for tau in (0.5, 1.0, 4.0):
        expected = [kl(student[i : i + 1], target[i : i + 1], tau) for i in range(3)]
        torch.testing.assert_close(divergence(student, target, tau).tolist(), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(divergence(student, target), divergence(target, student))
    # a target of probability 0 costs nothing, a student of probability 0 where the target is not costs everything
    certain = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    even = torch.zeros(1, 2, dtype=torch.float64)
    assert divergence(even, certain).item() == pytest.approx(math.log(2), rel=1e-12)
    assert divergence(certain, even).item() > 1e3


def test_gradient_identity():
    """d/dz of lambda tau^2 KL is lambda tau (softmax(z / tau) - softmax(z_t / tau)) / B."""
    method = build(lambdas=[0.5, 0.8, 0.3], taus=[2.0, 0.7])
    images, targets = batch()
    seen = []
    method.student.head_distill[0].register_forward_hook(lambda *_: seen.append(_[2]) or _[2].retain_grad())
    method.student.head_distill[1].register_forward_hook(lambda *_: seen.append(_[2]) or _[2].retain_grad())
    sum(method(images, targets, 0.0).values()).backward()
    for logits, weight, tau, name in zip(seen, (0.8, 0.3), (2.0, 0.7), ("teacher_1", "teacher_2"), strict=True):
        target = method.frozen[name](images)
        expected = weight * tau * ((logits / tau).softmax(1) - (target / tau).softmax(1)) / len(images)
        torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


def test_each_term_reaches_its_own_head_alone():
    method = build()
    images, targets = batch()
    heads = {"cls": method.student.head, "distill_1": method.student.head_distill[0]}
    heads["distill_2"] = method.student.head_distill[1]
    for name, loss in method(images, targets, 0.0).items():
        method.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        for other, head in heads.items():
            assert (head.weight.grad is not None) == (other == name)
        tokens = method.student.reg_token.grad
        assert (tokens[0].abs().sum(1) > 0).all()  # through attention every token takes part in every answer


def test_every_parameter_gets_a_gradient():
    for options in ({}, {"lambdas": [1.0, 0.0, 1.0]}):
        method = build(**options)
        sum(method(*batch(), 0.0).values()).backward()
        assert [name for name, p in method.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("names", [["cnn"], ["inn", "cnn"], ["cnn", "inn", "third"], ["cnn", "inn", "third", "cnn"]])
def test_any_number_of_teachers_in_the_order_of_the_tokens(names):
    method = build(teachers=names)
    images, targets = batch()
    losses = method(images, targets, 0.0)
    tokens = method.student.token_logits(images)
    assert list(losses) == ["cls", *(f"distill_{i + 1}" for i in range(len(names)))]
    for i, name in enumerate(names):
        expected = kl(tokens[i + 1], teacher(name).double()(images), 1.0)
        assert losses[f"distill_{i + 1}"].item() == pytest.approx(expected, rel=1e-9)


def test_a_student_without_tokens_answers_to_all_with_one_output():
    student = timm.create_model("vit_tiny_patch16_224", **STUDENT)
    method = build(student=student)
    images, targets = batch()
    losses, logits = method(images, targets, 0.0), method(images)
    assert losses["cls"].item() == pytest.approx(cross_entropy(logits, targets), rel=1e-9)
    for i, name in enumerate(("cnn", "inn"), 1):
        assert losses[f"distill_{i}"].item() == pytest.approx(kl(logits, teacher(name).double()(images), 1.0), rel=1e-9)
    rows = {row for table, row, _ in method.measure(images, targets) if table == "divergence"}
    assert rows == {"student"}


def test_teachers_are_frozen_and_outside_of_the_method():
    method = build()
    teachers = list(method.frozen.values())
    before = [copy.deepcopy(t.state_dict()) for t in teachers]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(2):
        sum(method(*batch(), 0.0).values()).backward()
        optimizer.step()
    own = {id(p) for p in method.parameters()}
    for model, state in zip(teachers, before, strict=True):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None or id(p) in own for p in model.parameters())
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {name.split(".")[0] for name in method.state_dict()} == {"student"}


def test_one_pass_through_student_and_teachers():
    method = build()
    passes = []
    for model in (method.student.patch_embed, *method.frozen.values()):
        model.register_forward_hook(lambda module, *_: passes.append((type(module).__name__, torch.is_grad_enabled())))
    method(*batch(), 0.0)
    assert passes == [("PatchEmbed", True), ("SmallCNN", False), ("RedNet", False)]
    method.lambdas[1] = 0.0
    losses = method(*batch(), 0.0)
    assert passes[3:] == [("PatchEmbed", True), ("RedNet", False)]  # a teacher without weight is not asked
    assert losses["distill_1"].item() == 0 and losses["distill_2"].item() > 0


def test_losses_stay_float32_under_autocast():
    method = build(dtype=torch.float32)
    images, targets = batch(dtype=torch.float32)
    exact = method(images, targets, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(images, targets, 0.0)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.testing.assert_close(sum(losses.values()), sum(exact.values()), rtol=0.05, atol=0.05)


def test_all_losses_fall_and_each_token_comes_nearest_to_its_teacher():
    method = build(student_options={"stems": ("conv", "inv"), "stem_width": 32})
    images, targets = batch(size=16)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    history = {"cls": [], "distill_1": [], "distill_2": []}
    for _ in range(40):
        losses = method(images, targets, 0.0)
        for name, loss in losses.items():
            history[name].append(loss.item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(values[-1] < 0.5 * values[0] for values in history.values()), history
    values = method.eval().measure(images, targets).items()
    table = {tuple(key): value.mean().item() for (name, *key), value in values if name == "divergence"}
    for i, own in enumerate(("1 cnn", "2 inn")):
        other = ("1 cnn", "2 inn")[1 - i]
        assert table[f"token {own}", f"KL from {own}"] < table[f"token {own}", f"KL from {other}"]
        assert table[f"token {own}", f"KL from {own}"] < table[f"token {other}", f"KL from {own}"]


def test_measurements_are_those_of_table_5():
    method = build(taus=[3.0, 2.0]).eval()
    images, targets = batch()
    values = method.measure(images, targets)
    tokens = method.student.token_logits(images)
    answers = {"class token": tokens[0], "token 1 cnn": tokens[1], "token 2 inn": tokens[2]}
    teachers = {"1 cnn": teacher("cnn").double()(images), "2 inn": teacher("inn").double()(images)}
    mixed = torch.stack([(images[i] + images[i - 1]) / 2 for i in range(4)])
    tokens_mixed, teachers_mixed = (
        method.student.token_logits(mixed),
        [teacher(n).double()(mixed) for n in ("cnn", "inn")],
    )
    for i, (row, answer) in enumerate(answers.items()):
        for j, (column, target) in enumerate(teachers.items()):
            value = values["divergence", row, f"KL from {column}"]
            assert value.shape == (4,) and value.mean().item() == pytest.approx(kl(answer, target, 1.0), rel=1e-9)
            value = values["divergence, mixed images", row, f"KL from {column}"].mean().item()
            assert value == pytest.approx(kl(tokens_mixed[i], teachers_mixed[j], 1.0), rel=1e-9)
        right = [100.0 * (row.argmax() == y) for row, y in zip(answer, targets, strict=True)]
        assert values["divergence", row, "top1"].tolist() == right
    for name, logits in teachers.items():
        assert values["teachers", name, "top1"].tolist() == (100.0 * (logits.argmax(1) == targets)).tolist()
    assert len(values) == 3 * 3 + 2 + 3 * 2


def test_exported_student_is_the_student_and_nothing_else():
    method = build().eval()
    exported = method.export()
    images, _ = batch()
    torch.testing.assert_close(exported(images), method(images), rtol=0, atol=0)
    plain = timm.create_model("cit_tiny_patch16_224", **STUDENT).double()
    plain.load_state_dict(exported.state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(images), method(images), rtol=0, atol=0)
    assert {id(p) for p in exported.parameters()} == {id(p) for p in method.parameters()}


def test_registered():
    assert get_method("co_advise") is CoAdvise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": [], "student_options": {"distill_tokens": 2}}, "teachers: Co-advise needs some"),
        ({"student_options": {"distill_tokens": 3}}, r"teachers: expected one per token of the student \(3\), got 2"),
        ({"lambdas": [1.0, 1.0]}, "lambdas: expected 3 numbers, got 2"),
        ({"lambdas": [1.0, -1.0, 1.0]}, "lambdas: expected numbers of at least 0, got -1.0"),
        ({"lambdas": [1.0, float("nan"), 1.0]}, "lambdas: expected numbers of at least 0, got nan"),
        ({"taus": [1.0]}, "taus: expected 2 numbers, got 1"),
        ({"taus": [1.0, 0.0]}, "taus: expected numbers above 0, got 0.0"),
        ({"taus": [float("inf"), 1.0]}, "taus: expected numbers above 0, got inf"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_teachers_of_other_classes_are_refused():
    student = timm.create_model("cit_tiny_patch16_224", **{**STUDENT, "num_classes": 7})
    with pytest.raises(ValueError, match="teachers: expected 7 classes, got 5 from cnn"):
        CoAdvise(CoAdviseOptions(teachers=["cnn", "inn"]), student, 7, teacher)


def test_imagenet_recipe_has_the_numbers_of_the_paper():
    config = load_config("co_advise", "imagenet_small", data="anywhere")
    method, data, augment = config.method, config.data, config.data.augment
    assert (method.lambdas, method.taus) == ([1.0, 1.0, 1.0], [1.0, 1.0])
    cnn, inn = (source.removeprefix("timm:").partition("@")[0] for source in method.teachers)
    assert cnn.startswith("regnety_040") and inn == "rednet101" and is_model(cnn) and is_model(inn)
    assert (config.model.name, config.model.kwargs["inference"]) == ("cit_small_aligned_patch16_224", "class")
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == ("adamw", 1e-3, 0.05)
    assert (config.epochs, data.batch_size, data.img_size, config.clip_grad) == (300, 1024, 224, 15.0)
    assert (config.sched.sched, config.sched.warmup_epochs, config.sched.min_lr) == ("cosine", 20, 1e-5)
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.reprob, augment.smoothing, augment.repeats) == (0.25, 0.1, 1)


def test_digits_recipe_differs_from_the_baseline_in_method_mixing_and_length():
    same = ["data.augment.mixup=0.8", "data.augment.cutmix=1.0", "epochs=100", "eval_every=10"]
    student, plain = load_config("co_advise", "digits"), load_config("plain", "digits", overrides=same)
    assert (student.data, student.optim, student.sched) == (plain.data, plain.optim, plain.sched)
    assert (student.epochs, student.clip_grad, student.precision) == (plain.epochs, plain.clip_grad, plain.precision)
    assert plain.model.kwargs.items() <= student.model.kwargs.items()
    unmixed = load_config("plain", "digits").data
    for name in ("digits", "digits_inn"):
        teacher_config = load_config("teacher", name)
        assert teacher_config.data == unmixed and teacher_config.method.name == "plain"
