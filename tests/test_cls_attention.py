"""cls_attention_maps against float64: values, gradients, layouts, sizes, errors, and inside PyTorch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    Target,
    check_operator,
    max_error,
    on_device,
    packed,
    sliced,
    transposed_rows,
    value_and_grads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fastib
from fastib import _native
from fastib.ops import cls_attention_maps
from fastib.reference import cls_attention_maps_ref

TOKENS = (2, 3, 17, 63, 65, 197, 257, 577)
DIMS = (1, 8, 16, 24, 32, 48, 64, 80, 128)


def draw(batch, heads, tokens, dim, dtype, prefix=1, seed=0):
    """q, k and a gradient of the maps."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, dim), (batch, heads, tokens, dim), (batch, heads, tokens - prefix)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def check(target: Target, q, k, grad_out, **options):
    q, k, grad_out = (on_device(t, target.device) for t in (q, k, grad_out))
    check_operator(
        lambda *x: cls_attention_maps(*x, backend=target.backend, **options),
        lambda *x: cls_attention_maps_ref(*x, **options),
        partial(steps, **options), [q, k], grad_out, q.dtype, ["grad_q", "grad_k"],
    )  # fmt: skip


def steps(q, k, num_prefix_tokens=1, scale=None, over="patches", round=lambda x: x):
    """The maps with their roundings: of the scores and of the probabilities."""
    scores = round((k * q[:, :, None] * (q.shape[2] ** -0.5 if scale is None else scale)).sum(-1))
    cut = num_prefix_tokens if over == "patches" else 0
    return round(scores[..., cut:].softmax(-1))[..., num_prefix_tokens - cut :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", ["patches", "all"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(target, tokens, over, dtype):
    check(target, *draw(2, 3, tokens, 24, dtype), over=over)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(target, dim, dtype):
    check(target, *draw(2, 2, 37, dim, dtype, prefix=2), num_prefix_tokens=2)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("over", ["patches", "all"])
def test_prefix_tokens(target, prefix, over):
    check(target, *draw(1, 2, 20, 16, torch.float32, prefix), num_prefix_tokens=prefix, over=over)


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0, 3.0])
def test_scale(target, scale):
    check(target, *draw(1, 2, 20, 16, torch.float32), scale=scale)


@pytest.mark.parametrize("layout", ["packed", "sliced", "columns", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts(target, layout, dtype):
    q, k, grad_out = draw(3, 2, 19, 24, dtype)
    if layout == "packed":
        whole, k, _ = packed(k.flip(2), k, k)
        q = whole[:, :, 0]
    elif layout == "sliced":
        q, k, grad_out = sliced(q), sliced(k), sliced(grad_out)
    elif layout == "columns":
        q, k, grad_out = transposed_rows(q), transposed_rows(k), transposed_rows(grad_out)
    else:
        q, k, grad_out = (t[:1].expand(t.shape) for t in (q, k, grad_out))
    check(target, q, k, grad_out)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradient_larger_than_the_caches(target, dtype):
    check(target, *draw(11, 6, 800, 64, dtype))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 80), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans()
)
def test_any_sizes(batch, heads, tokens, dim, dtype, every):
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    check(Target("cpu", "cpu"), *draw(batch, heads, tokens + 1, dim, dtype), over="all" if every else "patches")


def test_equals_the_row_of_full_attention(target):
    """The class token's row of the whole attention matrix, prefix columns cut off."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 3, 18, 16, generator=generator).to(target.device) for _ in range(2))
    whole = F.scaled_dot_product_attention(
        q.double(), k.double(), torch.eye(18).double().to(q.device).expand(2, 3, 18, 18)
    )
    maps = cls_attention_maps(q[:, :, 0], k, over="all", backend=target.backend)
    assert max_error(maps, whole[:, :, 0, 1:]) < 1e-6


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_scores_far_from_zero(target, offset):
    q, k, grad_out = draw(1, 2, 19, 16, torch.float32)
    k[..., 0], q[..., 0] = offset, 4.0
    check(target, q, k, grad_out)


def test_gradcheck(target):
    if target.device == "cuda":
        pytest.skip("no float64 on the GPU")
    inputs = [t.requires_grad_() for t in draw(2, 2, 7, 5, torch.float64)[:2]]
    for over in ("patches", "all"):
        assert torch.autograd.gradcheck(lambda q, k, over=over: cls_attention_maps(q, k, over=over), inputs)


def test_same_bits_twice_and_from_any_memory(target):
    q, k, grad_out = (t.to(target.device) for t in draw(2, 3, 65, 24, torch.float32))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    first, second = (
        value_and_grads(lambda *x: cls_attention_maps(*x, backend=target.backend), [q, k], grad_out) for _ in range(2)
    )
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 1, 8), (2, 2, 5, 0)])
def test_empty(target, shape):
    k = torch.randn(shape, device=target.device, requires_grad=True)
    q = torch.randn(*shape[:2], shape[3], device=target.device, requires_grad=True)
    maps = cls_attention_maps(q, k, backend=target.backend)
    expected = cls_attention_maps_ref(q, k)
    assert maps.shape == expected.shape and torch.equal(maps, expected)
    grads = torch.autograd.grad(maps.sum(), (q, k))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("over", ["patches", "all"])
def test_gradient_with_a_common_offset(target, over, dtype):
    """A softmax does not see it; nor may its gradient, though the maps are rounded to 16 bits."""
    q, k, grad_out = draw(2, 3, 37, 24, dtype)
    check(target, 3 * q, k, (grad_out + 10).to(dtype), over=over)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_maps_are_the_same(target, dtype):
    q, k, _ = (t.to(target.device) for t in draw(2, 3, 37, 24, dtype, prefix=2))
    maps = [
        cls_attention_maps(q.requires_grad_(trains), k, num_prefix_tokens=2, over="all", backend=target.backend)
        for trains in (True, False)
    ]
    assert maps[0].dtype == maps[1].dtype == dtype and torch.equal(*maps)


VALUE_ERRORS = [
    ({"k": torch.zeros(2, 10, 4)}, r"k must be of shape \(B, H, N, D\), got \(2, 10, 4\)"),
    ({"q": torch.zeros(2, 3, 5)}, r"q must be of shape \(2, 3, 4\).*got \(2, 3, 5\)"),
    ({"q": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"q must be float32.*got torch.int64"),
    ({"k": torch.zeros(2, 3, 10, 4, dtype=torch.float64)}, r"k must be torch.float32 like q, got torch.float64"),
    ({"num_prefix_tokens": 11}, r"num_prefix_tokens must be in \[0, N=10\], got 11"),
    ({"num_prefix_tokens": None}, "num_prefix_tokens must be an int, got None"),
    ({"num_prefix_tokens": True}, "num_prefix_tokens must be an int, got True"),
    ({"num_prefix_tokens": 1.0}, "num_prefix_tokens must be an int, got 1.0"),
    ({"scale": "a"}, "scale must be a finite number, got 'a'"),
    ({"num_prefix_tokens": -1}, "num_prefix_tokens must be 0 or more, got -1"),
    ({"scale": float("nan")}, r"scale must be a finite number, got nan"),
    ({"over": "keys"}, r"over must be 'patches' or 'all', got 'keys'"),
    ({"backend": "gpu"}, r"backend must be None or one of .*got 'gpu'"),
]


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_value_errors(changes, message):
    arguments = {"q": torch.zeros(2, 3, 4), "k": torch.zeros(2, 3, 10, 4)} | changes
    with pytest.raises(ValueError, match=message):
        cls_attention_maps(**arguments)


def test_other_errors():
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 3, 10, 4)
    with pytest.raises(RuntimeError, match="k must be on cpu like the other inputs, got meta"):
        cls_attention_maps(q, k.to("meta"))
    with pytest.raises(RuntimeError, match="backend='cuda' is not available"):
        cls_attention_maps(q, k, backend="cuda")
    if _native.lib_available():
        maps = cls_attention_maps(q.requires_grad_(), k)
        (grad,) = torch.autograd.grad(maps.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_native_checks():
    """The operators themselves refuse what would read out of bounds, whoever calls them."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    op, backward = torch.ops.fastib.cls_attention, torch.ops.fastib.cls_attention_backward
    q, k, probs = torch.zeros(2, 3, 4), torch.zeros(2, 3, 10, 4), torch.zeros(2, 3, 10)
    for arguments, message in [
        ((q, k[0], 1, 1.0, False, False), "k must have shape"),
        ((q[:, :2], k, 1, 1.0, False, False), "q must have shape"),
        ((q.double(), k, 1, 1.0, False, False), "q must be Float"),
        ((q, k, 11, 1.0, False, False), "num_prefix_tokens must be in"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match="grad must have shape"):
        backward(torch.zeros(2, 3, 11), q, k, probs, 1.0)
    with pytest.raises(RuntimeError, match="probs must have shape"):
        backward(probs, q, k, probs[..., 1:], 1.0)


def test_cut_maps_have_no_gradient_and_say_so():
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    q, k, _ = (t.requires_grad_() for t in draw(2, 3, 9, 8, torch.float32, prefix=2))
    maps = torch.ops.fastib.cls_attention(q, k, 2, 0.3, False, True)
    with pytest.raises(RuntimeError, match="maps_only=True keeps nothing for gradients"):
        maps.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_maps_changed_in_place_give_right_gradients_or_an_error(target, dtype):
    """Those in 16 bits are copies of what the backward reads; those in float32 are not."""
    q, k, grad_out = draw(2, 3, 9, 8, dtype)
    q, k = (t.to(target.device).requires_grad_() for t in (q, k))
    maps = cls_attention_maps(q, k, backend=target.backend)
    if dtype == torch.float32:
        with pytest.raises(RuntimeError, match="modified inplace"):
            maps.mul_(2)
        return
    found = torch.autograd.grad(maps.mul_(2), (q, k), grad_out.to(target.device))
    expected = torch.autograd.grad(
        cls_attention_maps(q, k, backend=target.backend), (q, k), 2 * grad_out.to(target.device)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_opcheck():
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    q, k, _ = draw(2, 3, 9, 8, torch.float32)
    torch.library.opcheck(
        torch.ops.fastib.cls_attention, (q.requires_grad_(), k.requires_grad_(), 1, 0.3, False, False)
    )
    probs = torch.ops.fastib.cls_attention(q.detach(), k.detach(), 1, 0.3, True, False)
    torch.library.opcheck(
        torch.ops.fastib.cls_attention_backward, (torch.randn_like(probs), q.detach(), k.detach(), probs, 0.3)
    )


def test_compile_and_autocast():
    q, k, grad_out = draw(2, 3, 9, 8, torch.float32)
    compiled = torch.compile(cls_attention_maps, fullgraph=True)
    for a, b in zip(value_and_grads(compiled, [q, k], grad_out), value_and_grads(cls_attention_maps, [q, k], grad_out),
                    strict=True):  # fmt: skip
        assert max_error(a, b) < 1e-6
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        maps = cls_attention_maps(q, k)
    assert maps.dtype == torch.bfloat16
    assert torch.equal(maps, cls_attention_maps(q.bfloat16(), k.bfloat16()))


def test_backends_are_listed():
    assert set(fastib.backends()["cls_attention_maps"]) == {"reference", "cpu", "cuda", "triton"}
