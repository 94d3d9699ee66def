"""Bootstrapping ViTs: its losses by hand, aligned gradients by hand in float64, and runs that use them."""

import copy

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F

import fastib.models  # noqa: F401  (registers the models)
from fastib.methods import get_method
from fastib.methods.bootstrap import Bootstrap, BootstrapOptions, align_gradients

CLASSES = 5
SIZES = {"img_size": 16, "patch_size": 2, "in_chans": 1, "num_classes": CLASSES}
SIZES |= {"embed_dim": 24, "depth": 4, "num_heads": 6, "mlp_ratio": 2.0}


def build(dtype=torch.float64, student=None, **options) -> Bootstrap:
    torch.manual_seed(0)
    student = timm.create_model("vit_tiny_patch16_224", **SIZES) if student is None else student
    method = Bootstrap(BootstrapOptions(**options), student, CLASSES, lambda source: None)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in method.modules():  # dropout draws other numbers whenever a test asks again
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return method.to(dtype).train()


def batch(size=6, seed=1, dtype=torch.float64, soft=False):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    if soft:
        return images, torch.rand(size, CLASSES, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def outputs(method: Bootstrap, images: torch.Tensor):
    """Logits and block outputs of both networks, by hooks; tokens without the class token, maps as they come."""
    tokens, maps = [], []
    handles = [b.register_forward_hook(lambda m, i, o: tokens.append(o[:, 1:])) for b in method.student.blocks]
    handles += [b.register_forward_hook(lambda m, i, o: maps.append(o)) for b in method.agent.blocks]
    logits, answer = method.student(images), method.agent(images)
    for handle in handles:
        handle.remove()
    return logits, answer, tokens, maps


def pooled(x: torch.Tensor, length: int) -> torch.Tensor:
    """F.avg_pool1d along the tokens of (B, N, C), as the published code does it."""
    step = x.shape[1] // length
    return F.avg_pool1d(x.transpose(1, 2), step, step).transpose(1, 2)


def equation_6(tokens: torch.Tensor, feature_map: torch.Tensor) -> torch.Tensor:
    """Layer-normalised sequences and their mean squared error, as the published code has it."""
    sequence = feature_map.detach().flatten(2).transpose(1, 2)
    length = min(tokens.shape[1], sequence.shape[1])
    a, v = (F.layer_norm(pooled(x, length), x.shape[2:]) for x in (sequence, tokens))
    return F.mse_loss(v, a)


def kl(teacher: torch.Tensor, student: torch.Tensor, tau: float) -> torch.Tensor:
    p, q = (teacher.detach() / tau).softmax(1), (student / tau).softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean() * tau**2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["res", "base"])
@pytest.mark.parametrize("soft", [False, True])
def test_equations_6_to_9(soft, form, shared):
    method = build(shared=shared, form=form)
    images, targets = batch(soft=soft)
    losses = method(images, targets, 0.25)
    logits, answer, tokens, maps = outputs(method, images)
    assert [m.shape[2] for m in maps] == ([16, 8, 8, 4] if form == "res" else [8] * 4)
    expected = {
        "ce": F.cross_entropy(logits, targets), "mutual": kl(answer, logits, 4.0),
        "features": 10 * 0.75 * sum(map(equation_6, tokens, maps)),
        "agent_ce": F.cross_entropy(answer, targets), "agent_mutual": kl(logits, answer, 4.0),
    }  # fmt: skip
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_options():
    images, targets = batch()
    whole = build()(images, targets, 0.5)
    some = build(layers=[3, 1], decay="none", label_weight=0.5, mutual_weight=0.25, feature_weight=5.0, temperature=2.0)
    losses = some(images, targets, 0.5)
    logits, answer, tokens, maps = outputs(some, images)
    expected = 5.0 * sum(equation_6(tokens[i], maps[i]) for i in (1, 3))
    torch.testing.assert_close(losses["features"], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["ce"], 0.5 * whole["ce"], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["mutual"], 0.25 * kl(answer, logits, 2.0), rtol=1e-10, atol=1e-12)
    flat = build(pooling="2d")
    losses = flat(images, targets, 0.0)
    _, _, tokens, maps = outputs(flat, images)
    grids = [t.transpose(1, 2).unflatten(2, (8, 8)) for t in tokens]
    pairs = [
        (grids[0], F.avg_pool2d(maps[0], 2)),
        (grids[1], maps[1]),
        (grids[2], maps[2]),
        (F.avg_pool2d(grids[3], 2), maps[3]),
    ]
    expected = 10 * sum(equation_6(g.flatten(2).transpose(1, 2), m) for g, m in pairs)
    torch.testing.assert_close(losses["features"], expected, rtol=1e-9, atol=0)


def test_neither_network_reaches_into_the_other():
    for shared in (False, True):
        method = build(shared=shared)
        if shared:
            method.shared_weights.part_ways()
        losses = method(*batch(), 0.0)
        own = {name: p for name, p in method.named_parameters() if name.startswith("agent.")}
        vit = [losses[name] for name in ("ce", "mutual", "features")]
        gradients = torch.autograd.grad(sum(vit), list(own.values()), allow_unused=True, retain_graph=True)
        assert all(g is None for g in gradients)
        theirs = [losses[name] for name in ("agent_ce", "agent_mutual")]
        assert all(g is None for g in torch.autograd.grad(
            sum(theirs), list(method.student.parameters()), allow_unused=True, retain_graph=True
        ))  # fmt: skip
        assert all(g is not None for g in torch.autograd.grad(sum(theirs), list(own.values())))


def by_hand(vit: list[torch.Tensor], agent: list[torch.Tensor], scope: str) -> list[torch.Tensor]:
    """Algorithm 1 in float64 on flat vectors."""
    groups = [list(range(len(vit)))] if scope == "all" else [[i] for i in range(len(vit))]
    result = [torch.empty(0)] * len(vit)
    for group in groups:
        v = torch.cat([vit[i].double().flatten() for i in group])
        a = torch.cat([agent[i].double().flatten() for i in group])
        if v @ a < 0:
            a = a - (v @ a) / (v @ v) * v
        for i, part in zip(group, ((v + a) / 2).split([vit[i].numel() for i in group]), strict=True):
            result[i] = part.view_as(vit[i])
    return result


@pytest.mark.parametrize("scope", ["tensor", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_alignment(scope, dtype):
    generator = torch.Generator().manual_seed(0)
    vit = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((4, 6), (6,), (3, 5), (2,))]
    agent = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(dtype) for v in vit]
    agent[0], agent[1] = -vit[0] + 0.5 * agent[0], vit[1] + 0.5 * agent[1]  # against, along
    vit[3], agent[3] = torch.zeros_like(vit[3]), agent[3]
    expected = by_hand(vit, agent, scope)
    kept = [a.clone() for a in agent]
    results = [v.clone() for v in vit]
    align_gradients(zip(results, agent, strict=True), scope)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for r, e, a, k in zip(results, expected, agent, kept, strict=True):
        torch.testing.assert_close(r.double(), e, rtol=tolerance, atol=tolerance)
        assert torch.equal(a, k)
    if scope == "tensor" and dtype == torch.float64:
        rest = 2 * results[0] - vit[0]
        assert (rest * vit[0]).sum().abs() < 1e-12  # at right angles
    align_gradients([], scope)


def accelerator(**options) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def expected_gradients(method: Bootstrap, batches: list, align: str) -> dict[str, torch.Tensor]:
    """Two separate backward passes through a copy whose agent has tensors of its own, summed over the batches."""
    total: dict[str, dict[str, torch.Tensor]] = {"vit": {}, "agent": {}}
    names = dict(method.named_parameters())
    for images, targets in batches:
        twin = copy.deepcopy(method)
        twin.aligns = False
        twin.shared_weights = twin.agent.blocks[0].weights
        twin.shared_weights.leaves.clear()
        parameters = dict(twin.named_parameters())
        losses = twin(images, targets, 0.0)
        split = {"vit": ("ce", "mutual", "features"), "agent": ("agent_ce", "agent_mutual")}
        for network, terms in split.items():
            loss = sum(losses[term] for term in terms) / len(batches)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[network][name] = total[network].get(name, 0) + gradient
    shared = {name for name in total["vit"] if name in total["agent"]}
    assert len(shared) == 4 * 7
    result = {n: total["vit"].get(n, total["agent"].get(n)).clone() for n in names}
    order = sorted(shared)
    values = {n: slice(48, None) if n.endswith("qkv.weight") else slice(None) for n in order}
    assert all(not total["agent"][n][:48].any() for n in order if n.endswith("qkv.weight"))
    parts = [[total[network][n][values[n]] for n in order] for network in ("vit", "agent")]
    aligned = [v + a for v, a in zip(*parts, strict=True)] if align == "none" else by_hand(*parts, align)
    for name, part in zip(order, aligned, strict=True):
        result[name][values[name]] = part
    return result


@pytest.mark.parametrize("align", ["tensor", "all", "none"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_of_shared_weights(align, accumulate):
    """What is not shared, queries and keys too, gets its own network's gradient; alignment comes at the step."""
    method = build(shared=True, align=align)
    batches = [batch(seed=seed) for seed in range(accumulate)]
    expected = expected_gradients(method, batches, align)
    machine = accelerator(gradient_accumulation_steps=accumulate)
    for images, targets in batches:
        with machine.accumulate(method):
            method.backward(method(images, targets, 0.0), machine)
    for name, parameter in method.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-10 * max(scale, 1e-3), msg=name)
    assert all(leaf.grad is None for leaf in method.shared_weights.leaves.values())


def test_clipping_comes_after_the_alignment():
    method = build(shared=True)
    expected = expected_gradients(method, [batch()], "tensor")
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    machine = accelerator()
    method.backward(method(*batch(), 0.0), machine)
    found = machine.clip_grad_norm_(method.parameters(), 0.1)
    torch.testing.assert_close(found, norm, rtol=1e-10, atol=0)
    for name, parameter in method.named_parameters():
        clipped = expected[name] * 0.1 / (norm + 1e-6)  # as PyTorch guards the division
        torch.testing.assert_close(parameter.grad, clipped, rtol=1e-8, atol=1e-10, msg=name)


def test_mixed_precision():
    """Under bfloat16 the aligned gradients are those of the rounded networks: near the exact ones, and in float32."""
    method = build(torch.float32, shared=True)
    exact = expected_gradients(copy.deepcopy(method).double(), [batch()], "tensor")
    machine = accelerator(mixed_precision="bf16")
    images, targets = batch(dtype=torch.float32)
    with machine.autocast():
        losses = method(images, targets, 0.0)
    method.backward(losses, machine)
    for name, parameter in method.named_parameters():
        assert parameter.grad.dtype == torch.float32
        difference = (parameter.grad - exact[name]).norm() / exact[name].norm().clamp_min(1e-6)
        assert difference < 0.15 or exact[name].norm() < 1e-3, name


def scaled(scale: float) -> Accelerator:
    """What accelerate makes for float16 on a GPU, and refuses to make on a CPU."""
    machine = accelerator()
    machine.state._mixed_precision, machine.native_amp = "fp16", True
    machine.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return machine


@pytest.mark.parametrize("align", ["tensor", "all"])
def test_gradient_scaler(align):
    """float16: two micro-batches, scaled by 2^10, aligned once, unscaled and clipped: SGD's step is that by hand."""
    method = build(torch.float32, shared=True, align=align)
    batches = [batch(seed=seed) for seed in range(2)]
    exact = expected_gradients(copy.deepcopy(method).double(), batches, align)
    norm = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    before = {name: parameter.detach().double() for name, parameter in method.named_parameters()}
    machine = scaled(2.0**10)
    optimizer = machine.prepare_optimizer(torch.optim.SGD(method.parameters(), lr=1.0))
    for images, targets in batches:
        with torch.autocast("cpu", torch.float16):
            losses = method(images.float(), targets, 0.0)
        machine.gradient_state._set_sync_gradients(images is batches[-1][0])
        method.backward({name: loss / 2 for name, loss in losses.items()}, machine)
    found = machine.clip_grad_norm_(method.parameters(), 0.1)
    torch.testing.assert_close(found.double(), norm, rtol=5e-3, atol=0)
    optimizer.step()
    assert not optimizer.step_was_skipped
    for name, parameter in method.named_parameters():
        step, expected = before[name] - parameter.detach().double(), exact[name] * 0.1 / norm
        difference = (step - expected).norm() / expected.norm().clamp_min(1e-6)
        assert difference < 0.02 or exact[name].norm() < 1e-3, name


@pytest.mark.parametrize("network", ["ce", "agent_ce"])
def test_gradient_scaler_skips_what_overflows(network):
    """An infinite gradient of either network reaches the scaler through the alignment: no step, half the scale."""
    method = build(torch.float32, shared=True)
    before = copy.deepcopy(method.state_dict())
    machine = scaled(2.0**16)
    optimizer = machine.prepare_optimizer(torch.optim.SGD(method.parameters(), lr=1.0))
    losses = method(*batch(dtype=torch.float32), 0.0)
    statistics = {n: v.clone() for n, v in method.state_dict().items() if "running" in n or "tracked" in n}
    losses[network] = losses[network] * 1e36
    method.backward(losses, machine)
    optimizer.step()
    assert optimizer.step_was_skipped and machine.scaler.get_scale() == 2.0**15
    for name, value in method.state_dict().items():
        assert torch.equal(value, statistics.get(name, before[name])), name
    assert all(leaf.grad is None for leaf in method.shared_weights.leaves.values())


def test_compiled_method():
    """torch.compile of losses and backward pass: the aligned gradients, of this step's weights and not of the last."""
    method = build(torch.float32, shared=True)
    machine, optimizer = accelerator(), torch.optim.SGD(method.parameters(), lr=0.05)
    method.compile()
    for seed in range(2):
        expected = expected_gradients(copy.deepcopy(method).double(), [batch(seed=seed)], "tensor")
        optimizer.zero_grad()
        method.backward(method(*batch(seed=seed, dtype=torch.float32), 0.0), machine)
        for name, parameter in method.named_parameters():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(
                parameter.grad.double(), expected[name], rtol=1e-3, atol=1e-4 * max(scale, 1e-3), msg=name
            )
        optimizer.step()


def test_the_step_after_an_optimizer_step_uses_the_new_weights():
    method = build(shared=True)
    machine, optimizer = accelerator(), torch.optim.SGD(method.parameters(), lr=0.1)
    for seed in range(3):
        expected = expected_gradients(method, [batch(seed=seed)], "tensor")
        optimizer.zero_grad()
        method.backward(method(*batch(seed=seed), 0.0), machine)
        name = "student.blocks.1.mlp.fc1.weight"
        gradient = method.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10)
        optimizer.step()


def test_activations_are_kept_once():
    """What the graph saves does not grow by parting the ways."""
    sizes = {}
    for align in ("none", "tensor"):
        method, kept = build(shared=True, align=align), {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            losses = method(*batch(), 0.0)
        sizes[align] = sum(kept.values())
        del losses
    assert sizes["tensor"] == sizes["none"]


def test_student_is_all_that_is_left():
    for shared in (False, True):
        method = build(shared=shared)
        student = method.export()
        assert set(student.state_dict()) == set(timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict())
        assert torch.equal(method(batch()[0]), student(batch()[0]))
    assert get_method("bootstrap") is Bootstrap


def test_fsdp_is_refused():
    class Sharded:
        is_fsdp2 = True

    with pytest.raises(RuntimeError, match="do not go together with FSDP"):
        build(shared=True).backward({}, Sharded())


@pytest.mark.parametrize(("options", "message"), [
    ({"align": "half"}, "align: expected one of"), ({"pooling": "max"}, "pooling: expected one of"),
    ({"decay": "cosine"}, "decay: expected one of"), ({"form": "big"}, "form: expected one of"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ({"feature_weight": -1.0}, "feature_weight: expected a finite number of at least 0, got -1.0"),
    ({"layers": [4]}, r"layers: expected blocks in \[0, 3\], got 4"),
    ({"down_sample": [7]}, r"down_sample: expected blocks in \[0, 3\]"),
    ({"form": "base", "down_sample": [0, 1, 2, 3]}, r"down_sample: block 3 leaves 1 x 1 places, too few to halve"),
])  # fmt: skip
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_other_students_are_refused():
    with pytest.raises(ValueError, match="expected a timm ViT"):
        build(student=timm.create_model("digits_cnn", in_chans=1, num_classes=CLASSES))
