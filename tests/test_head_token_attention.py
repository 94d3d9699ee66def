"""head_token_attention: its numbers against float64 on every instruction set and on the GPU, and inside PyTorch."""

from functools import partial

import pytest
import torch
from helpers import (
    DTYPES,
    check_operator,
    expanded,
    max_error,
    on_device,
    packed,
    sliced,
    transposed_rows,
    value_and_grads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastib import _native
from fastib.ops import head_token_attention
from fastib.reference.head_token_attention import ATTN_STREAM, head_token_attention_ref
from fastib.reference.philox import keep_factor, keep_mask

NAMES = ["grad_q", "grad_k", "grad_v", "grad_q_extra", "grad_k_extra", "grad_v_extra"]
SIZES = [  # B, H, N, T, D
    (2, 2, 65, 4, 48), (1, 2, 257, 8, 48), (1, 2, 197, 6, 64), (1, 2, 65, 8, 24), (1, 1, 577, 12, 32), (3, 2, 2, 1, 16),
    (2, 3, 1, 3, 8), (1, 2, 63, 0, 80), (1, 1, 40, 60, 128), (2, 1, 5, 1, 7), (1, 1, 1100, 3, 16),
]  # fmt: skip
LAYOUTS = {
    "packed": lambda x: (*packed(*x[:3]), *packed(*x[3:])),
    "sliced": lambda x: tuple(map(sliced, x)),
    "rows_not_dense": lambda x: tuple(map(transposed_rows, x)),
    "expanded": lambda x: tuple(map(expanded, x)),
    "one_row": lambda x: tuple(t[:, :, :1].expand(t.shape) for t in x),
}


def draw(batch, heads, tokens, extra, head_dim, dtype, seed=0):
    """The six inputs and the gradient to the result."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [tokens] * 3 + [extra] * 3 + [tokens]
    *inputs, grad_out = (
        torch.randn(batch, heads, n, head_dim, generator=generator, dtype=torch.float64).to(dtype) for n in sizes
    )
    return inputs, grad_out


def steps(q, k, v, q_extra, k_extra, v_extra, dtype, round=lambda x: x, scale=None, attn_dropout=0.0, seed=None):
    """The operator with its roundings: of scores, probabilities and outputs, and of the gradients of each.

    Sums over the head dimension round term by term, in quadrature; where nothing wider adds them up, each of the n
    partial sums rounds, by half a unit, and they grow as its square root. Hooks hold detached tensors alone: a graph
    that one of its own hooks holds is never freed."""
    growth = max(1.0, q.shape[3] ** 0.5 / 2) if dtype in (torch.float32, torch.float64) else 1.0

    def rounded(t, terms=lambda grad: grad):
        t = round(t)
        if t.requires_grad:
            t.register_hook(lambda grad: grad + round(terms(grad)) - terms(grad))
        return t

    def keep_gradient(grad):
        nonlocal to_out
        to_out = grad

    to_out, tokens, extra = None, q.shape[2], q_extra.shape[2]
    q, k, v = (torch.cat(pair, 2) for pair in ((q, q_extra), (k, k_extra), (v, v_extra)))
    scores = rounded(q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale))
    total = scores.logsumexp(-1, True)
    if total.requires_grad:
        total.register_hook(lambda grad: grad + round(delta_terms()) - delta_terms())
    v_value = v.detach()
    probs = rounded((scores - total).exp(), lambda grad: growth * (to_out.square() @ v_value.square().mT).sqrt())
    if attn_dropout:
        probs = probs * keep_mask(seed, tuple(probs.shape), attn_dropout, ATTN_STREAM) * keep_factor(attn_dropout)
    joined = probs @ v
    joined_value = joined.detach()
    if joined.requires_grad:
        joined.register_hook(keep_gradient)

    def delta_terms():
        return growth * (to_out * joined_value).square().sum(-1, True).sqrt()

    out, rest = rounded(joined).split((tokens, extra), 2)
    return torch.cat((out[:, :, :1] + rest.mean(2, True), out[:, :, 1:]), 2) if extra else out


def check(target, inputs, grad_out, **options):
    inputs, grad_out = [on_device(t, target.device) for t in inputs], on_device(grad_out, target.device)
    check_operator(
        lambda *x: head_token_attention(*x, backend=target.backend, **options),
        lambda *x: head_token_attention_ref(*x, **options),
        partial(steps, dtype=grad_out.dtype, **options), inputs, grad_out, grad_out.dtype, NAMES,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(target, size, dtype):
    check(target, *draw(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("size", [(2, 2, 17, 3, 16), (1, 1, 1100, 5, 8)], ids=str)
@pytest.mark.parametrize("dropout", [0.2, 0.9])
def test_dropout(target, size, dropout, dtype):
    check(target, *draw(*size, dtype), attn_dropout=dropout, seed=2**40 + 7)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout, dtype):
    inputs, grad_out = draw(3, 2, 42, 5, 24, dtype)
    change = LAYOUTS[layout]
    grad_out = sliced(grad_out) if layout == "sliced" else change([grad_out] * 6)[0]
    check(target, change(inputs), grad_out)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(0, 20), st.integers(1, 70),
    st.sampled_from(DTYPES), st.sampled_from([None, 0.0, -0.7]),
)  # fmt: skip
def test_any_sizes(batch, heads, tokens, extra, head_dim, dtype, scale):
    from helpers import Target

    if not _native.lib_available():
        pytest.skip(_native.why_not())
    check(Target("cpu", "cpu"), *draw(batch, heads, tokens, extra, head_dim, dtype), scale=scale)


def test_mask_is_the_shared_philox(target):
    """The dropout mask read off the result, bit for bit: rows of the tokens, columns of all."""
    tokens, extra = 13, 5
    zeros, zeros_extra = torch.zeros(2, 3, tokens, 18), torch.zeros(2, 3, extra, 18)
    identity = torch.eye(18).expand(2, 3, 18, 18)
    inputs = (zeros, zeros, identity[:, :, :tokens], zeros_extra, zeros_extra, identity[:, :, tokens:])
    out = head_token_attention(
        *(t.to(target.device) for t in inputs), attn_dropout=0.4, seed=77, backend=target.backend
    ).cpu()
    keep = keep_mask(77, (2, 3, 18, 18), 0.4, ATTN_STREAM)
    assert torch.equal(out[:, :, 1:] != 0, keep[:, :, 1:tokens])
    exact = (keep[:, :, 0].double() + keep[:, :, tokens:].double().mean(2)) * keep_factor(0.4) / 18
    assert max_error(out[:, :, 0], exact) < 1e-7


def test_large_scores(target):
    """One key takes all, and a whole block of keys may score -infinity."""
    inputs, grad_out = draw(1, 2, 1110, 3, 16, torch.float32)
    check(target, [inputs[0] * 200, *inputs[1:]], grad_out)
    inputs[1][:, :, :1105] = -1e30
    inputs[0], inputs[3] = inputs[0].abs() + 1, inputs[3].abs() + 1
    out = head_token_attention(*(t.to(target.device) for t in inputs), scale=1e10, backend=target.backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 3, 8), (2, 0, 5, 3, 8), (2, 2, 0, 3, 8), (2, 2, 5, 3, 0), (2, 2, 5, 0, 8)])
def test_empty(target, shape):
    inputs, grad_out = draw(*shape, torch.float32)
    out, *grads = value_and_grads(
        lambda *x: head_token_attention(*x, backend=target.backend),
        [t.to(target.device) for t in inputs],
        grad_out.to(target.device),
    )
    exact = head_token_attention_ref(*(t.double() for t in inputs))
    assert out.shape == exact.shape and max_error(out, exact) < 1e-6
    if shape[2] * shape[4] == 0:
        assert not any(g.any() for g in grads)


def test_same_bits_for_any_threads_and_poisoned_memory(target, restored_threads, poisoned_memory):
    inputs, grad_out = draw(5, 3, 81, 4, 16, torch.float32)
    inputs, grad_out = [t.to(target.device) for t in inputs], grad_out.to(target.device)

    def run():
        return value_and_grads(lambda *x: head_token_attention(*x, backend=target.backend), inputs, grad_out)

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(results[0], other, strict=True))


def test_result_layout(target):
    inputs, grad_out = draw(2, 3, 17, 4, 8, torch.float32)
    inputs = [t.to(target.device).requires_grad_() for t in inputs]
    out = head_token_attention(*inputs, backend=target.backend)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out, inputs, grad_out.to(target.device))
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


@pytest.mark.parametrize("options", [{}, {"attn_dropout": 0.3, "seed": 5}, {"scale": -0.7}])
def test_gradcheck(target, options):
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    inputs, _ = draw(2, 2, 4, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: head_token_attention(*x, backend=target.backend, **options), [t.requires_grad_() for t in inputs]
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", [{}, {"attn_dropout": 0.3, "seed": 5}], ids=["plain", "dropout"])
def test_compile_and_autocast(backend, options):
    if backend == "cpu" and not _native.lib_available():
        pytest.skip(_native.why_not())
    inputs, grad_out = draw(2, 3, 17, 4, 8, torch.float32)

    def function(*x):
        return head_token_attention(*(t * 1.5 for t in x), backend=backend, **options)

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    for a, b in zip(
        value_and_grads(compiled, inputs, grad_out), value_and_grads(function, inputs, grad_out), strict=True
    ):
        assert max_error(a, b) < 2e-5
    with torch.autocast("cpu", torch.bfloat16):
        low = head_token_attention(*inputs, backend=backend, **options)
    assert torch.equal(low, head_token_attention(*(t.bfloat16() for t in inputs), backend=backend, **options))
    torch.compiler.reset()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype, dropout):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and not _native.lib_available():
        pytest.skip(_native.why_not())
    inputs, grad_out = draw(2, 3, 13, 4, 8, dtype)
    inputs = [t.to(device).requires_grad_() for t in inputs]
    options = (torch.tensor([3], device=device) if dropout else None, 0.3, dropout)
    op, backward = torch.ops.fastib.head_token_attention, torch.ops.fastib.head_token_attention_backward
    torch.library.opcheck(op, (*inputs, *options), rtol=1e-2, atol=1e-2)
    saved = [t.detach() for t in (*inputs, *op(*inputs, *options))]
    torch.library.opcheck(backward, (grad_out.to(device), *saved, *options))


def test_export():
    inputs, _ = draw(2, 3, 13, 4, 8, torch.float32)

    class Attend(torch.nn.Module):
        def forward(self, *x):
            return head_token_attention(*x) + 1

    program = torch.export.export(Attend(), tuple(inputs))
    assert max_error(program.module()(*inputs), Attend()(*inputs)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: lambda t: t[0]}, r"q must be of shape \(B, H, N, D\)"),
        ({0: lambda t: t.long()}, "q must be float32"),
        ({1: lambda t: t[:, :, 1:]}, r"k must be of shape \(2, 3, 13, 8\), as q is"),
        ({2: lambda t: t.double()}, "v must be torch.float32 like q"),
        ({3: lambda t: t[:1]}, r"q_extra must be of shape \(2, 3, T, 8\)"),
        ({4: lambda t: t[:, :, :1]}, r"k_extra must be of shape \(2, 3, 4, 8\), as q_extra is"),
        ({5: lambda t: t.half()}, "v_extra must be torch.float32 like q"),
    ],
)
def test_bad_tensors(change, message):
    inputs, _ = draw(2, 3, 13, 4, 8, torch.float32)
    for index, f in change.items():
        inputs[index] = f(inputs[index])
    with pytest.raises(ValueError, match=message):
        head_token_attention(*inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_dropout": 1.5}, ValueError, "attn_dropout must be a probability"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"seed": 1.5, "attn_dropout": 0.1}, ValueError, "seed must be"),
        ({"backend": "gpu"}, ValueError, "backend must be None or one of"),
        ({"backend": "cuda"}, RuntimeError, "the GPU implementation of head_token_attention is 'triton'"),
    ],
)
def test_bad_options(options, error, message):
    inputs, _ = draw(2, 3, 13, 4, 8, torch.float32)
    with pytest.raises(error, match=message):
        head_token_attention(*inputs, **options)


def test_native_operator_checks_what_it_relies_on():
    """Calls past the public function cannot read out of bounds."""
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    inputs, grad_out = draw(2, 3, 13, 4, 8, torch.float32)
    op, backward = torch.ops.fastib.head_token_attention, torch.ops.fastib.head_token_attention_backward
    out, stats = op(*inputs, None, 0.3, 0.0)
    with pytest.raises(RuntimeError, match="v_extra must have shape"):
        op(*inputs[:5], inputs[5][:, :, 1:], None, 0.3, 0.0)
    with pytest.raises(RuntimeError, match="seed must be given"):
        op(*inputs, None, 0.3, 0.5)
    for saved, name in (((out[:, :, 1:], stats), "out"), ((out, stats[..., 1:]), "stats")):
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            backward(grad_out, *inputs, *saved, None, 0.3, 0.0)
    with pytest.raises(RuntimeError, match="grad_out must have shape"):
        backward(grad_out[:1], *inputs, out, stats, None, 0.3, 0.0)
