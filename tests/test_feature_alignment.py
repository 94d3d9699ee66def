"""feature_alignment_loss against float64: values, gradients, lengths, hard tokens, layouts, errors, inside PyTorch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, check_operator, max_error, on_device, sliced, transposed_rows, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st

import fastib
from fastib import _native
from fastib.ops import feature_alignment_loss
from fastib.reference import feature_alignment_loss_ref
from fastib.reference.feature_alignment import pooled_unit_tokens

SIZES = [
    (2, 49, 196, 288),
    (2, 196, 49, 288),
    (3, 16, 16, 72),
    (1, 1, 1, 1),
    (2, 1, 7, 5),
    (4, 12, 4, 33),
    (1, 3, 9, 1030),
]


def draw(batch, tokens, others, channels, dtype, seed=0):
    """student (B, N, C) and teacher (B, M, C), with means that centring takes off."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, tokens, channels), (batch, others, channels)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) + 0.5).to(dtype) for s in shapes]


def steps(teacher, center, eps, reduction, student, round=lambda x: x):
    """The loss with its roundings: of the averaged tokens, the units and the distances, and of what is kept."""
    tokens = min(student.shape[1], teacher.shape[1])
    student = round(student.unflatten(1, (tokens, student.shape[1] // tokens)).mean(2))
    if student.requires_grad:
        student.register_hook(round)
    units = [round(pooled_unit_tokens(x, tokens, center, eps)) for x in (student, round(teacher))]
    loss = round(round(units[0] - units[1]).square().sum(-1))
    return {"none": loss, "mean": round(loss.mean()), "sum": round(loss.sum())}[reduction]


def check(target, student, teacher, center=True, eps=1e-5, reduction="mean"):
    student, teacher = on_device(student, target.device), on_device(teacher, target.device)
    options = {"center": center, "eps": eps, "reduction": reduction}
    wide = torch.promote_types(student.dtype, torch.float32)
    shape = (student.shape[0], min(student.shape[1], teacher.shape[1])) if reduction == "none" else ()
    grad_out = (torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.5).to(wide).to(target.device)
    check_operator(
        lambda s: feature_alignment_loss(s, teacher, backend=target.backend, **options),
        lambda s: feature_alignment_loss_ref(s, teacher.cpu().to(s.dtype), **options),
        lambda s, round=lambda x: x: steps(teacher.double().cpu(), center, eps, reduction, s, round),
        [student], grad_out, student.dtype, ["grad_student"],
    )  # fmt: skip


@pytest.mark.parametrize("mean", [3.0, 10.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
def test_mean_far_from_zero(target, mean, spread):
    """Rounding the mean of a token leaves something of it, which is taken off, too."""
    student, teacher = (spread * t + mean for t in draw(2, 8, 8, 100, torch.float32))
    check(target, student, teacher)


def test_the_reference_is_the_published_loss():
    """Layer-normalised, averaged along the tokens, and their mean squared error over everything."""
    for size in SIZES:
        student, teacher = draw(*size, torch.float64)
        length = min(size[1:3])

        def published(x, length=length):
            step = x.shape[1] // length
            pooled = F.avg_pool1d(x.transpose(1, 2), step, step).transpose(1, 2)
            return F.layer_norm(pooled, x.shape[2:])

        expected = F.mse_loss(published(student), published(teacher))
        torch.testing.assert_close(feature_alignment_loss_ref(student, teacher), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(target, size, reduction, dtype):
    check(target, *draw(*size, dtype), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 10.0])
def test_options(target, center, eps, dtype):
    check(target, *draw(2, 8, 4, 48, dtype), center=center, eps=eps)


@pytest.mark.parametrize("layout", ["sliced", "columns", "expanded", "map", "without class token"])
def test_layouts(target, layout):
    student, teacher = draw(3, 16, 16, 40, torch.float32)
    change = {
        "sliced": sliced, "columns": transposed_rows, "expanded": lambda t: t[:1].expand(t.shape),
        "map": lambda t: t.transpose(1, 2).unflatten(2, (4, 4)).contiguous(
            memory_format=torch.channels_last
        ).flatten(2).transpose(1, 2),
        "without class token": lambda t: torch.cat([torch.full_like(t[:, :1], torch.nan), t], 1)[:, 1:],
    }[layout]  # fmt: skip
    check(target, change(student), change(teacher))


@pytest.mark.parametrize("kind", ["equal", "opposite", "tiny", "huge", "constant", "zero teacher", "large mean"])
def test_hard_tokens(target, kind):
    """Where distance or gradient is a small difference of large numbers, and where eps decides."""
    student, teacher = draw(2, 6, 6, 64, torch.float32)
    if kind in ("equal", "opposite"):
        teacher = student * (2.5 if kind == "equal" else -2.5)
    elif kind in ("tiny", "huge"):
        student, teacher = ((t - 0.5) * (1e-8 if kind == "tiny" else 1e15) for t in (student, teacher))
    elif kind == "constant":
        student = torch.full_like(student, 3.0)
    elif kind == "zero teacher":
        teacher = torch.zeros_like(teacher)
    else:
        student = student + 30.0
    check(target, student, teacher, reduction="none")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.booleans(), st.integers(1, 70), st.sampled_from(DTYPES)
)
def test_any_sizes(batch, tokens, step, swap, channels, dtype):
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    from helpers import Target

    lengths = (tokens * step, tokens) if swap else (tokens, tokens * step)
    check(Target("cpu", "cpu"), *draw(batch, *lengths, channels, dtype))


def test_gradcheck(target):
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    for size in ((2, 3, 6, 5), (2, 6, 3, 5)):
        student, teacher = draw(*size, torch.float64)
        for options in ({}, {"reduction": "none"}, {"center": False}, {"eps": 0.5}):
            call = lambda s, t=teacher, o=options: feature_alignment_loss(s, t, backend=target.backend, **o)  # noqa: E731
            assert torch.autograd.gradcheck(call, [student.requires_grad_()])


def test_same_bits_for_any_threads(target, restored_threads, poisoned_memory):
    student, teacher = (t.to(target.device) for t in draw(5, 12, 48, 100, torch.float32))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(value_and_grads(lambda s: feature_alignment_loss(s, teacher, backend=target.backend), [student]))
    for other in results[1:]:
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [(0, 3, 3, 4), (2, 0, 0, 4)])
def test_empty(target, size):
    student, teacher = (t.to(target.device) for t in draw(*size, torch.float32))
    for reduction in ("sum", "none", "mean"):
        results, expected = (
            value_and_grads(lambda s, f=f, r=reduction: f(s, teacher, reduction=r), [student])
            for f in (feature_alignment_loss, feature_alignment_loss_ref)
        )
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_what_is_kept():
    """For the gradient one tensor of the shorter sequence is kept, and neither input."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    student, teacher = draw(2, 64, 16, 32, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        feature_alignment_loss(student.requires_grad_(), teacher, reduction="none")
    assert sorted(kept) == [(0,), (2, 16), (2, 16, 32)]


VALUE_ERRORS = [
    ({"student": torch.zeros(2, 3)}, r"student must be of shape \(B, N, C\), got \(2, 3\)"),
    ({"teacher": torch.zeros(2, 4, 6)}, r"teacher must be of shape \(2, M, 5\), got \(2, 4, 6\)"),
    ({"teacher": torch.zeros(1, 4, 5)}, r"teacher must be of shape \(2, M, 5\), got \(1, 4, 5\)"),
    ({"teacher": torch.zeros(2, 6, 5)}, r"teacher must be of a length that divides the student's 4 tokens.*got 6"),
    ({"teacher": torch.zeros(2, 0, 5)}, r"teacher must be of a length that divides.*got 0"),
    ({"teacher": torch.zeros(2, 4, 5).double()}, r"teacher must be torch.float32 like student, got torch.float64"),
    ({"teacher": torch.zeros(2, 4, 5, requires_grad=True)}, r"teacher must be a constant, got a tensor that requires"),
    ({"student": torch.zeros(2, 4, 5, dtype=torch.int32)}, r"student must be float32.*got torch.int32"),
    ({"reduction": "max"}, r"reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ({"eps": -1.0}, r"eps must be not negative, got -1.0"),
    ({"eps": float("nan")}, r"eps must be a finite number, got nan"),
    ({"backend": "gpu"}, r"backend must be None or one of"),
]


@pytest.mark.parametrize(("change", "message"), VALUE_ERRORS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_value_errors(change, message):
    with pytest.raises(ValueError, match="^feature_alignment_loss: " + message):
        feature_alignment_loss(**({"student": torch.zeros(2, 4, 5), "teacher": torch.zeros(2, 4, 5)} | change))


def test_device_and_backend_errors():
    with pytest.raises(RuntimeError, match="teacher must be on cpu like the other inputs, got meta"):
        feature_alignment_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5, device="meta"))
    with pytest.raises(RuntimeError, match="the GPU implementation of feature_alignment_loss is 'triton'"):
        feature_alignment_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5), backend="cuda")
    assert set(fastib.backends()["feature_alignment_loss"]) == {"reference", "cpu", "cuda", "triton"}


def test_native_checks():
    """The operators themselves refuse what would read out of bounds, whoever calls them."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    for name, schema in sys.modules["fastib.ops.feature_alignment"].SCHEMAS.items():
        expected = torch._C.parse_schema(f"fastib::{name}{schema}")
        assert str(getattr(torch.ops.fastib, name).default._schema) == str(expected)
    student, teacher = draw(2, 4, 8, 5, torch.float32)
    op = torch.ops.fastib.feature_alignment
    for arguments, message in [
        ((student[0], teacher, True, 0.0, True), "student must have shape"),
        ((student, teacher[:1], True, 0.0, True), "teacher must have shape"),
        ((student, teacher[:, :7], True, 0.0, True), "lengths that divide"),
        ((student, teacher.double(), True, 0.0, True), "teacher must be Float"),
        ((student, teacher, True, -1.0, True), "eps must not be negative"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    _, direction, factor = op(student, teacher, True, 1e-5, True)
    for arguments, message in [
        ((torch.ones(2, 5), direction, factor, 4), "grad must have shape"),
        ((torch.ones(2, 4), direction, factor[:1], 4), "factor must have shape"),
        ((torch.ones(2, 4), direction, factor, 6), "tokens must be a multiple"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastib.feature_alignment_backward(*arguments)


def test_opcheck():
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    student, teacher = draw(2, 8, 4, 5, torch.float32)
    op = torch.ops.fastib.feature_alignment
    torch.library.opcheck(op, (student.requires_grad_(), teacher, True, 1e-5, True))
    torch.library.opcheck(op, (student.detach(), teacher, False, 1e-5, False))
    _, direction, factor = op(student.detach(), teacher, True, 1e-5, True)
    torch.library.opcheck(torch.ops.fastib.feature_alignment_backward, (torch.ones(2, 4), direction, factor, 8))


def test_compile_autocast_and_second_derivative():
    student, teacher = draw(2, 8, 4, 16, torch.float32)

    def loss(s):
        return feature_alignment_loss(s * 1.5, teacher)

    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(value_and_grads(compiled, [student]), value_and_grads(loss, [student]), strict=True):
        assert max_error(a, b) < 1e-6
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        low = feature_alignment_loss(student, teacher.bfloat16())
    assert low.dtype == torch.float32
    assert torch.equal(low, feature_alignment_loss(student, teacher.bfloat16().float()))
    leaf = student.requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf).square(), leaf, create_graph=True)
    if _native.lib_available():
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.square().sum().backward()
