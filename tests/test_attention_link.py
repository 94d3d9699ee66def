"""attention_link_loss against float64: values, gradients, masks, hard maps, sizes, errors, and inside PyTorch."""

from functools import partial

import pytest
import torch
from helpers import (
    DTYPES,
    Target,
    check_operator,
    max_error,
    on_device,
    sliced,
    transposed_rows,
    value_and_grads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastib import _native
from fastib.ops import attention_link_loss, augment_attention
from fastib.reference import attention_link_loss_ref, augment_attention_ref

SIZES = [
    (2, 72, 95, 196),
    (3, 7, 33, 17),
    (1, 1, 1, 1),
    (4, 36, 52, 49),
    (2, 16, 32, 64),
    (2, 5, 70, 3),
    (1, 130, 40, 31),
]
NAMES = ["grad_attn", "grad_weight", "grad_bias"]


def draw(batch, maps, channels, positions, dtype, seed=0):
    """attn, weight, bias, target and a mask. The weight is one that 16 bits hold, as it is rounded to them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    attn = normal(batch, maps, positions).softmax(-1).to(dtype)
    weight, bias = normal(channels, maps).to(dtype).to(wide), 0.01 * normal(channels).to(wide)
    return attn, weight, bias, normal(batch, channels, positions).to(dtype), normal(channels, maps) > 0


def check(where: Target, attn, weight, bias, teacher, reduction="mean", **options):
    attn, weight, bias, teacher = (on_device(t, where.device) for t in (attn, weight, bias, teacher))
    options = {name: on_device(v, where.device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    shape = (attn.shape[0], weight.shape[0]) if reduction == "none" else ()
    grad_out = torch.rand(shape, generator=torch.Generator().manual_seed(5)).to(weight.dtype).to(where.device) + 0.5
    host = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in options.items()}

    def reference(a, *x):
        return attention_link_loss_ref(a, *x, teacher.cpu().to(a.dtype), reduction=reduction, **host)

    check_operator(
        lambda *x: attention_link_loss(*x, teacher, reduction=reduction, backend=where.backend, **options),
        reference, partial(steps, teacher.double().cpu(), reduction, **host), [attn, weight, bias], grad_out,
        attn.dtype, NAMES,
    )  # fmt: skip


def steps(teacher, reduction, a, weight, bias, round=lambda x: x, mask=None, eps=1e-12):
    """The loss with its roundings: of the maps, their norms and the gradients of both, the units and the distances."""
    maps = round(augment_attention_ref(a, weight, bias, mask))
    norms = [round(t.norm(dim=2, keepdim=True)) for t in (maps, teacher)]
    for t in (maps, norms[0]):
        if t.requires_grad:
            t.register_hook(round)
    units = [round(t / n.clamp_min(eps)) for t, n in zip((maps, round(teacher)), norms, strict=True)]
    loss = round(units[0] - units[1]).square().sum(2)
    return loss if reduction == "none" else loss.sum() / (teacher.numel() if reduction == "mean" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(target, size, reduction, dtype):
    check(target, *draw(*size, dtype)[:4], reduction=reduction)


@pytest.mark.parametrize("size", [(2, 4, 3, 9), (8, 8, 192, 400)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_from_outside_that_float16_does_not_hold(target, size, reduction):
    """A scaler's 65536, and a mean over so many elements that one of them is below float16."""
    attn, weight, bias, teacher, _ = (t.to(target.device) for t in draw(*size, torch.float16))
    grad_out = torch.tensor(65536.0 if reduction == "sum" else 1.0, device=target.device)
    attn = attn * (1024 if reduction == "sum" else 1)  # whose gradient is the smaller

    def gradients(backend, dtype, wide):
        t = teacher.to(dtype)
        inputs = attn.to(dtype), weight.to(wide), bias.to(wide)
        return value_and_grads(
            lambda *x: attention_link_loss(*x, t, reduction=reduction, backend=backend), inputs, grad_out.to(wide)
        )

    kernel = gradients(target.backend, torch.float16, torch.float32)
    exact = gradients("reference", torch.float64, torch.float64)
    for actual, expected in zip(kernel, exact, strict=True):
        step = 2.0**-24 if actual.dtype == torch.float16 else 0.0  # of the smallest numbers
        assert max_error(actual, expected) <= 4e-3 * expected.abs().max().item() + step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["random", "blocks", "none kept", "one kept"])
def test_masks(target, kind, reduction, dtype):
    *tensors, mask = draw(3, 40, 70, 49, dtype)
    if kind == "blocks":
        mask = torch.zeros_like(mask)
        mask[:24, 18:30], mask[24:70, 33:] = True, True
    elif kind != "random":
        mask = torch.zeros_like(mask)
        mask[17, 39] = kind == "one kept"
    check(target, *tensors, reduction=reduction, mask=mask)


def test_links_left_out_do_not_matter(target):
    """Neither their weight nor its gradient: NaN there stays there."""
    attn, weight, bias, teacher, mask = (t.to(target.device) for t in draw(2, 20, 40, 25, torch.float32))
    loss, *grads = value_and_grads(
        lambda *x: attention_link_loss(*x, teacher, mask=mask, backend=target.backend),
        [attn, weight.masked_fill(~mask, torch.nan), bias],
    )
    assert max_error(loss, attention_link_loss_ref(attn, weight, bias, teacher, mask=mask)) < 1e-6
    assert not grads[1][~mask].any() and not any(g.isnan().any() for g in grads)


@pytest.mark.parametrize("layout", ["sliced", "columns", "expanded"])
def test_layouts(target, layout):
    attn, weight, bias, teacher, _ = draw(3, 20, 40, 25, torch.float32)
    change = {"sliced": sliced, "columns": transposed_rows, "expanded": lambda t: t[:1].expand(t.shape)}[layout]
    check(target, change(attn), sliced(weight) if layout == "sliced" else weight, bias, change(teacher))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["parallel", "opposite", "nearly constant", "tiny", "huge", "zero", "zero teacher"])
def test_hard_maps(target, kind, reduction, dtype):
    """Where the distance, or its gradient, is a small difference of large numbers."""
    attn, weight, bias, teacher, _ = draw(2, 24, 40, 49, dtype)
    if dtype == torch.float16 and kind in ("tiny", "huge"):
        pytest.skip("float16 holds no such numbers")
    if kind in ("parallel", "opposite"):
        exact = weight.double() @ attn.double() + bias.double()[:, None]
        teacher = (exact * (2.5 if kind == "parallel" else -2.5)).to(dtype)
    elif kind == "nearly constant":
        weight, bias = weight * 1e-4, torch.ones_like(bias)
    elif kind == "tiny":
        weight, bias = weight * 1e-9, bias * 1e-9
    elif kind == "huge":
        weight, bias, teacher = weight * 1e18, bias * 1e18, teacher * 1e18
    elif kind == "zero":
        weight, bias = weight * 0, bias * 0
    else:
        teacher = torch.zeros_like(teacher)
    check(target, attn, weight, bias, teacher, reduction=reduction)


def test_eps(target):
    attn, weight, bias, teacher, _ = draw(2, 24, 40, 49, torch.float32)
    check(target, attn, weight, bias, teacher, eps=1.0)  # above many norms, below others
    check(target, attn, weight, bias, teacher, eps=0.0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_sizes(batch, maps, channels, positions, dtype, masked):
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    *tensors, mask = draw(batch, maps, channels, positions, dtype)
    check(Target("cpu", "cpu"), *tensors, mask=mask if masked else None)


def test_gradcheck(target):
    if target.device == "cuda":
        pytest.skip("no float64 on the GPU")
    attn, weight, bias, teacher, mask = draw(2, 4, 5, 6, torch.float64)
    inputs = [t.requires_grad_() for t in (attn, weight, bias)]
    for options in ({}, {"reduction": "none"}, {"mask": mask}):
        assert torch.autograd.gradcheck(lambda *x, o=options: attention_link_loss(*x, teacher, **o), inputs)


def test_same_bits_for_any_threads(target):
    attn, weight, bias, teacher, mask = (t.to(target.device) for t in draw(7, 40, 70, 49, torch.float32))

    def run():
        return value_and_grads(
            lambda *x: attention_link_loss(*x, teacher, mask=mask, backend=target.backend), [attn, weight, bias]
        )

    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        results = [run()]
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(results[0], other, strict=True))


def test_maps_themselves():
    attn, weight, bias, _, mask = draw(2, 24, 40, 49, torch.float32)
    exact = (weight.double() * mask) @ attn.double() + bias.double()[:, None]
    assert max_error(augment_attention(attn, weight, bias, mask=mask), exact) < 1e-6


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(target, size):
    attn, weight, bias, teacher, _ = (t.to(target.device) for t in draw(*size, torch.float32))
    for reduction in ("sum", "none"):
        results, expected = (
            value_and_grads(lambda *x, f=f, r=reduction: f(*x, teacher, reduction=r), [attn, weight, bias])
            for f in (attention_link_loss, attention_link_loss_ref)
        )
        assert [r.shape for r in results] == [e.shape for e in expected]
        torch.testing.assert_close(results[0], expected[0])
        # Without maps a channel's map is constant, and its length has no gradient.
        assert all(g.abs().max() < 1e-3 for g in results[1:] if g.numel())


def test_extra_memory(target):
    """No tensor of the size of the target is made; the (B, C, S) maps would be one."""
    if target.device != "cpu":
        pytest.skip("memory of the GPU is measured by the benchmarks")
    attn, weight, bias, teacher, _ = draw(16, 24, 300, 49, torch.float32)
    leaves = [t.requires_grad_() for t in (attn, weight, bias)]
    with torch.profiler.profile(profile_memory=True) as profile:
        attention_link_loss(*leaves, teacher).backward()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert largest < teacher.numel() * 4 / 4


VALUE_ERRORS = [
    ({"eps": None}, "eps must be a finite number, got None"),
    ({"attn": torch.zeros(2, 3)}, r"attn must be of shape \(B, M, S\), got \(2, 3\)"),
    ({"weight": torch.zeros(4, 5)}, r"weight must be of shape \(C, M=3\), got \(4, 5\)"),
    ({"bias": torch.zeros(3)}, r"bias must be of shape \(4,\), got \(3,\)"),
    ({"bias": None}, "bias must be a tensor, got NoneType"),
    ({"target": None}, "target must be a tensor, got NoneType"),
    ({"mask": torch.ones(4, 2, dtype=torch.bool)}, r"mask must be of shape \(4, 3\), got \(4, 2\)"),
    ({"mask": torch.ones(4, 3)}, r"mask must be bool, got torch.float32"),
    ({"target": torch.zeros(2, 4, 6)}, r"target must be of shape \(2, 4, 5\), got \(2, 4, 6\)"),
    ({"target": torch.zeros(2, 4, 5).double()}, r"target must be torch.float32 like attn, got torch.float64"),
    ({"target": torch.zeros(2, 4, 5, requires_grad=True)}, r"target must be a constant, got a tensor that requires"),
    ({"attn": torch.zeros(2, 3, 5, dtype=torch.int32)}, r"attn must be float32.*got torch.int32"),
    ({"weight": torch.zeros(4, 3, dtype=torch.int64)}, r"weight must be floating point, got torch.int64"),
    ({"reduction": "max"}, r"reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ({"eps": -1.0}, "eps must be not negative, got -1.0"),
    ({"eps": float("nan")}, "eps must be a finite number, got nan"),
]


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_value_errors(changes, message):
    shapes = {"attn": (2, 3, 5), "weight": (4, 3), "bias": (4,), "target": (2, 4, 5)}
    with pytest.raises(ValueError, match=message):
        attention_link_loss(**({name: torch.zeros(shape) for name, shape in shapes.items()} | changes))


def test_device_errors():
    attn, weight, bias, teacher, _ = draw(2, 3, 4, 5, torch.float32)
    with pytest.raises(RuntimeError, match="target must be on cpu like the other inputs, got meta"):
        attention_link_loss(attn, weight, bias, teacher.to("meta"))


def test_native_checks():
    """The operators themselves refuse what would read out of bounds, whoever calls them."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    attn, weight, bias, teacher, mask = draw(2, 3, 4, 5, torch.float32)
    op = torch.ops.fastib.attention_link_loss
    for arguments, message in [
        ((attn[0], weight, bias, teacher, None, 0.0), "attn must have shape"),
        ((attn, weight[:, :2], bias, teacher, None, 0.0), "weight must have shape"),
        ((attn, weight, bias[:2], teacher, None, 0.0), "bias must have shape"),
        ((attn, weight, bias, teacher[:1], None, 0.0), "target must have shape"),
        ((attn, weight, bias, teacher.double(), None, 0.0), "target must be Float"),
        ((attn, weight.bfloat16(), bias, teacher, None, 0.0), "weight must be Float"),
        ((attn, weight, bias, teacher, mask[:2], 0.0), "mask must have shape"),
        ((attn, weight, bias, teacher, mask.float(), 0.0), "mask must be Bool"),
        ((attn, weight, bias, teacher, None, -1.0), "eps must not be negative"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match="grad must have shape"):
        torch.ops.fastib.attention_link_loss_backward(torch.zeros(2, 3), attn, weight, bias, teacher, None, 0.0)


def test_opcheck():
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    attn, weight, bias, teacher, mask = draw(2, 3, 4, 5, torch.float32)
    leaves = [t.requires_grad_() for t in (attn, weight, bias)]
    torch.library.opcheck(torch.ops.fastib.attention_link_loss, (*leaves, teacher, mask, 1e-12))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.fastib.attention_link_loss_backward, (torch.ones(2, 4), *plain, teacher, None, 1e-12)
    )
    torch.library.opcheck(torch.ops.fastib.attention_link_loss_and_gradients, (*plain, teacher, mask, 1e-12))


def test_compile_and_autocast():
    attn, weight, bias, teacher, mask = draw(2, 6, 8, 9, torch.float32)

    def loss(*x):
        return attention_link_loss(*x, teacher, mask=mask)

    compiled = torch.compile(loss, fullgraph=True)
    inputs = [attn, weight, bias]
    for a, b in zip(value_and_grads(compiled, inputs), value_and_grads(loss, inputs), strict=True):
        assert max_error(a, b) < 1e-6
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(attn, weight, bias)
    assert low.dtype == torch.float32
    exact = attention_link_loss(attn.bfloat16(), weight, bias, teacher.bfloat16(), mask=mask)
    assert torch.equal(low, exact)
