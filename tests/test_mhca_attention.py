"""mhca_attention: its numbers against the reference in float64, on every instruction set and on the GPU."""

import math

import pytest
import torch
from helpers import DTYPES, kernel_targets, max_error, squarest_grid, value_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mhca_problem import LAYOUTS, NAMES, Problem

from fastib.ops import mhca_attention
from fastib.reference.mhca_attention import ATTN_STREAM, RPE_STREAM, position_term
from fastib.reference.philox import keep_mask

TOKENS = (1, 2, 63, 65, 197, 257, 577)
HEAD_DIMS = (8, 16, 24, 32, 48, 64, 80, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values_and_gradients(target, tokens, head_dim, dtype):
    batch, heads = (2, 2) if tokens < 200 else (1, 2)
    Problem(batch, heads, squarest_grid(tokens - 1), head_dim, dtype, seed=tokens + head_dim).check(target)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("batch", "heads", "grid", "prefix"),
    [
        (1, 1, (1, 1), 0),
        (3, 1, (1, 1), 2),
        (2, 3, (0, 0), 5),
        (1, 2, (1, 37), 1),
        (1, 2, (37, 1), 3),
        (3, 5, (4, 9), 0),
        (2, 2, (9, 4), 2),
        (2, 2, (6, 7), 9),
        (5, 3, (3, 3), 1),
    ],
)
def test_grids_and_prefixes(target, batch, heads, grid, prefix, dtype):
    Problem(batch, heads, grid, 16, dtype, prefix=prefix).check(target)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 5, 7, 9, 17, 33, 40, 63, 65, 72, 96, 100, 127, 129, 192, 256])
def test_any_head_dim(target, head_dim):
    Problem(2, 2, (5, 6), head_dim, torch.float32).check(target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_keys(target, dtype):
    Problem(1, 1, (30, 40), 16, dtype, prefix=0).check(target)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("rpe", "attn"), [(0.1, 0.0), (0.0, 0.25), (0.3, 0.2), (0.999, 0.0), (0.0, 0.999)])
@pytest.mark.parametrize(("grid", "prefix"), [((14, 14), 1), ((3, 5), 2)])
def test_dropout(target, grid, prefix, rpe, attn, dtype):
    seed = torch.tensor([-(2**62) + 12345])
    problem = Problem(2, 3, grid, 16, dtype, prefix=prefix, rpe_dropout=rpe, attn_dropout=attn)
    problem.options["seed"] = seed.item()
    problem.check(target)


def test_everything_dropped(target):
    """With attn_dropout = 1 the result is 0; with rpe_dropout = 1 it is plain attention."""
    problem = Problem(2, 2, (4, 4), 8, torch.float32, attn_dropout=1.0, seed=3)
    assert all(not t.any() for t in problem.kernel(target))
    problem = Problem(2, 2, (4, 4), 8, torch.float32, rpe_dropout=1.0)
    out, *_, grad_alpha, grad_center = problem.kernel(target)
    plain = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in problem.inputs[:3]))
    assert max_error(out, plain) < 1e-6
    assert not grad_alpha.any() and not grad_center.any()


@pytest.mark.parametrize("p", [0.25, 0.7])
def test_masks_are_the_shared_philox(target, p):
    """Both masks read off the result, bit for bit."""
    batch, heads, grid, tokens = 3, 2, (3, 5), 16
    zeros = torch.zeros(batch, heads, tokens, tokens, device=target.device)
    identity = torch.eye(tokens, device=target.device).expand_as(zeros)
    alpha, center = torch.full((heads,), 0.05), torch.full((heads, 2), 0.3)
    alpha, center = alpha.to(target.device), center.to(target.device)

    attn = mhca_attention(
        zeros, zeros, identity, 0 * alpha, center, grid, attn_dropout=p, seed=77, backend=target.backend
    )
    assert torch.equal(attn.cpu() != 0, keep_mask(77, (batch, heads, tokens, tokens), p, ATTN_STREAM))

    attn = mhca_attention(zeros, zeros, identity, alpha, center, grid, rpe_dropout=p, seed=77, backend=target.backend)
    dropped = (attn == attn[..., :1]).cpu()  # a score of 0, like the class token's
    kept = keep_mask(77, (heads, tokens, tokens), p, RPE_STREAM) & (position_term(alpha, center, grid).cpu() != 0)
    assert torch.equal(~dropped, kept.expand(batch, -1, -1, -1))


def test_seed_forms_agree(target):
    problem = Problem(2, 2, (4, 4), 8, torch.float32, rpe_dropout=0.3, attn_dropout=0.3)
    inputs = [t.to(target.device) for t in problem.inputs]
    options = {"rpe_dropout": 0.3, "attn_dropout": 0.3, "backend": target.backend}
    by_int = mhca_attention(*inputs, 4, seed=9, **options)
    assert torch.equal(by_int, mhca_attention(*inputs, (4, 4), seed=torch.tensor(9).to(target.device), **options))
    assert torch.equal(by_int, mhca_attention(*inputs, [4, 4], seed=torch.tensor([[9]]).to(target.device), **options))
    torch.manual_seed(1)
    first, second = mhca_attention(*inputs, 4, **options), mhca_attention(*inputs, 4, **options)
    torch.manual_seed(1)
    assert torch.equal(first, mhca_attention(*inputs, 4, **options)) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout, dtype):
    """Views give what their dense copies give, for the inputs and for the gradient that comes back."""
    problem = Problem(3, 2, (6, 7), 24, dtype)
    q, k, v, grad_out = LAYOUTS[layout](*problem.inputs[:3], problem.grad_out)
    alpha = torch.stack([problem.inputs[3]] * 3, dim=1)[:, 1]
    center = problem.inputs[4].T.contiguous().T
    problem.check(target, [q, k, v, alpha, center], grad_out)


def test_result_layout(target):
    """(B, H, N, D) is stored as a dense (B, N, H, D), and so are the gradients of the native operator."""
    problem = Problem(2, 3, (4, 4), 8, torch.float32)
    inputs = [t.to(target.device) for t in problem.inputs]
    out = mhca_attention(*inputs, 4, backend=target.backend)
    assert out.transpose(1, 2).is_contiguous()
    options = (None, 4, 4, 1, 0.5, 0.0, 0.0)
    out, stats = torch.ops.fastib.mhca_attention(*inputs, *options)
    assert stats.is_contiguous() and stats.shape == (2, 3, 2, 17) and stats.dtype == torch.float32
    grads = torch.ops.fastib.mhca_attention_backward(out, *inputs, out, stats, *options)
    assert all(t.transpose(1, 2).is_contiguous() for t in grads[:3]) and all(t.is_contiguous() for t in grads[3:])


def test_softmax_statistics(target):
    """What the backward starts from: each row's largest score, in units of log 2, and the exponentials' sum from it."""
    problem = Problem(2, 2, (5, 5), 16, torch.float32)
    q, k, v, alpha, center = (t.to(target.device) for t in problem.inputs)
    _, stats = torch.ops.fastib.mhca_attention(q, k, v, alpha, center, None, 5, 5, 1, 0.25, 0.0, 0.0)
    scores = 0.25 * q.double() @ k.double().mT + position_term(alpha.double(), center.double(), (5, 5))
    top = scores.amax(-1)
    exact = torch.stack((top / math.log(2), (scores - top.unsqueeze(-1)).exp().sum(-1)), dim=2)
    assert max_error(stats, exact) < 1e-5


@pytest.mark.parametrize(
    ("shape", "grid", "prefix"),
    [((0, 2, 5, 8), 2, 1), ((2, 0, 5, 8), 2, 1), ((2, 2, 0, 8), 0, 0), ((2, 2, 5, 0), 2, 1), ((2, 2, 0, 8), (0, 7), 0)],
)
def test_empty(target, shape, grid, prefix):
    inputs = [torch.randn(shape) for _ in range(3)] + [torch.ones(shape[1]), torch.ones(shape[1], 2)]
    inputs = [t.to(target.device) for t in inputs]
    for dropout in (0.0, 0.5):
        out, *grads = value_and_grads(
            lambda *x, p=dropout: mhca_attention(
                *x, grid, num_prefix_tokens=prefix, backend=target.backend, rpe_dropout=p, attn_dropout=p
            ),
            inputs,
        )
        assert out.shape == shape
        for grad, t in zip(grads, inputs, strict=True):
            assert grad.shape == t.shape and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rpe", [0.0, 0.2])
def test_poisoned_memory(target, poisoned_memory, rpe, dtype):
    """Neither fresh memory nor what a call full of NaN has left behind shows in a result."""
    problem = Problem(2, 2, (5, 7), 24, dtype, rpe_dropout=rpe)
    problem.options["seed"] = 4
    poison = Problem(2, 2, (9, 9), 80, dtype)
    poison.inputs = [torch.full_like(t, math.nan) for t in poison.inputs]
    poison.kernel(target)
    problem.check(target)


def test_same_bits_twice_and_with_any_thread_count(target, restored_threads):
    """Also where one image is computed alone: a mask knows the batch index, so that is without attention dropout."""
    problem = Problem(5, 3, (9, 9), 16, torch.float32, rpe_dropout=0.2)
    problem.options["seed"] = 11
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.kernel(target))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    q, k, v, alpha, center = problem.inputs
    alone = problem.kernel(target, [q[2:3], k[2:3], v[2:3], alpha, center], problem.grad_out[2:3])
    assert all(torch.equal(a, b[2:3]) for a, b in zip(alone[:4], results[0][:4], strict=True))


@pytest.mark.parametrize("options", [{}, {"rpe_dropout": 0.3, "attn_dropout": 0.2, "seed": 5}, {"scale": -0.7}])
def test_gradcheck(target, options):
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    problem = Problem(2, 2, (2, 3), 5, torch.float64, prefix=2)
    inputs = [t.requires_grad_() for t in problem.inputs]
    assert torch.autograd.gradcheck(
        lambda *x: mhca_attention(*x, (2, 3), num_prefix_tokens=2, backend=target.backend, **options), inputs
    )


def test_only_some_gradients(target):
    """Any one input may be the only one that is learned; its gradient has the same bits as among all."""
    problem = Problem(2, 2, (4, 4), 8, torch.float32)
    _, *grads = problem.kernel(target)
    for index, expected in enumerate(grads):
        inputs = [t.to(target.device) for t in problem.inputs]
        inputs[index] = inputs[index].requires_grad_()
        out = mhca_attention(*inputs, 4, backend=target.backend)
        out.backward(problem.grad_out.to(target.device))
        assert torch.equal(inputs[index].grad, expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("logits", [100.0, 1e4])
def test_large_logits(target, logits, dtype):
    if dtype == torch.float16 and logits > 1e3:
        pytest.skip("q would overflow float16")
    Problem(2, 2, (5, 6), 16, dtype, logits=logits, prefix=2).check(target)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_scores_far_below_zero(target, dtype):
    """Keys behind the last, which a kernel may pad with zeros, would outweigh every real one."""
    problem = Problem(1, 2, (4, 4), 16, dtype)
    problem.inputs[0] += 8
    problem.inputs[1] -= 8
    problem.check(target)


@pytest.mark.parametrize("alpha", [-30.0, -1.0, 0.0, 1e-30, 30.0])
def test_extreme_alpha(target, alpha):
    problem = Problem(2, 2, (14, 14), 16, torch.float32)
    problem.inputs[3] = torch.full_like(problem.inputs[3], alpha)
    problem.check(target)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_dropout_over_several_blocks_of_keys(target, dtype):
    problem = Problem(1, 1, (33, 34), 8, dtype, rpe_dropout=0.1, attn_dropout=0.2)
    problem.options["seed"] = 7
    problem.check(target)


@pytest.mark.parametrize("alpha", [-1e30, -1e6, 1e6, 1e30])
def test_huge_alpha_stays_finite(target, alpha):
    problem = Problem(2, 2, (14, 14), 16, torch.float32)
    problem.inputs[3] = torch.full_like(problem.inputs[3], alpha)
    assert all(t.isfinite().all() for t in problem.kernel(target)[:4])


@pytest.mark.parametrize("alpha", [1e36, 3e38])
def test_every_key_of_a_block_out_of_reach(target, alpha):
    """Scores of -infinity: each patch attends to itself, in the last of several blocks of keys too."""
    problem = Problem(1, 2, (1, 1200), 8, torch.float32, prefix=0)
    problem.inputs[3:] = [torch.full((2,), alpha), torch.zeros(2, 2)]
    out, *grads = problem.kernel(target)
    torch.testing.assert_close(out.cpu(), problem.inputs[2], rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in grads[:3])


@pytest.mark.parametrize("grid", [(1, 1101), (1101, 1), (32, 33)])
@pytest.mark.parametrize("rpe", [0.0, 0.2])
def test_terms_made_row_by_row(target, grid, rpe):
    """Grids whose tables or masks are too large to keep."""
    options = {"rpe_dropout": rpe, "seed": 3} if rpe else {}
    problem = Problem(1, 1, grid, 8, torch.float32)
    problem.inputs[3] *= 0.01
    problem.options |= options
    problem.check(target)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize(("grid", "head_dim"), [((14, 14), 16), ((7, 9), 48), ((19, 18), 33)])
def test_no_bias_in_16_bits(target, grid, head_dim, dtype):
    """Roundings are independent, and their sum along the exact result is small; a wrong factor's is not."""
    problem = Problem(2, 3, grid, head_dim, dtype)
    for actual, exact in list(zip(problem.kernel(target), problem.exact(), strict=True))[:4]:
        error = ((actual.double().cpu() - exact) * exact).sum() / exact.square().sum()
        assert error.abs() <= 8 * torch.finfo(dtype).eps / exact.numel() ** 0.5


def test_large_alpha_attends_to_center(target):
    problem = Problem(1, 2, (7, 7), 8, torch.float32)
    problem.inputs[3] = torch.full((2,), 1e4)
    problem.inputs[4] = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    out, *_ = problem.kernel(target)
    v = problem.inputs[2][0, :, 1:].reshape(2, 7, 7, 8)
    patches = out[0, :, 1:].reshape(2, 7, 7, 8).cpu()
    assert torch.equal(patches[0, :-1], v[0, 1:])
    assert torch.equal(patches[1, :-1, 1:], v[1, 1:, :-1])


@pytest.mark.parametrize("where", range(5))
def test_nan_stays_where_it_belongs(target, where):
    """NaN in gives NaN out, in the image and head it is in, and nowhere else."""
    problem = Problem(2, 2, (5, 5), 8, torch.float32)
    problem.inputs[where] = problem.inputs[where].clone()
    problem.inputs[where].view(-1)[3 if where < 3 else 0] = math.nan
    actual, exact = problem.kernel(target), problem.exact()
    assert torch.equal(actual[0].cpu().isnan(), exact[0].isnan())
    for name, ours, theirs in zip(NAMES[1:], actual[1:], exact[1:], strict=True):
        assert torch.equal(ours.cpu().isnan(), theirs.isnan()), name


def test_low_precision_position_parameters(target):
    """A module cast to bfloat16 has a bfloat16 alpha: computed in float32, gradients in the dtype it came in."""
    problem = Problem(2, 2, (4, 4), 8, torch.bfloat16)
    low = [*problem.inputs[:3], *(t.to(torch.bfloat16) for t in problem.inputs[3:])]
    actual = problem.kernel(target, low)
    assert all(t.dtype == torch.bfloat16 for t in actual)
    upcast = problem.kernel(target, [*low[:3], *(t.float() for t in low[3:])])
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(actual, upcast, strict=True))


def test_rows_of_one_number(target):
    """All probabilities are alike and no score has a gradient: what is subtracted rounds as what is left of it."""
    problem = Problem(1, 1, (3, 3), 67, torch.float32, prefix=3)
    inputs = LAYOUTS["one_number"](*problem.inputs[:3], problem.grad_out)
    problem.check(target, [*inputs[:3], *problem.inputs[3:]], inputs[3])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("where", kernel_targets(), ids=str)
def test_any_shape_layout_and_dtype(where, data):
    if where.why_not():
        pytest.skip(where.why_not())
    batch, heads, prefix = (data.draw(st.integers(1, n)) for n in (4, 5, 4))
    grid = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    head_dim, dtype = (
        data.draw(st.integers(1, 70)),
        data.draw(st.sampled_from(DTYPES[: 3 if where.device == "cuda" else 4])),
    )
    options = {
        "rpe_dropout": data.draw(st.sampled_from([0.0, 0.1, 0.6])),
        "attn_dropout": data.draw(st.sampled_from([0.0, 0.1, 0.6])),
        "scale": data.draw(st.sampled_from([None, 0.1, -1.0, 0.0])),
    }
    problem = Problem(batch, heads, grid, head_dim, dtype, prefix=prefix - 1, **options)
    problem.options["seed"] = data.draw(st.integers(-(2**63), 2**63 - 1))
    q, k, v, grad_out = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](*problem.inputs[:3], problem.grad_out)
    with where.forced():
        problem.check(where, [q, k, v, *problem.inputs[3:]], grad_out)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # most compile kernels anew
@given(data=st.data())
@pytest.mark.parametrize("where", kernel_targets("triton")[-1:], ids=str)
def test_any_shape_layout_and_dtype_on_a_gpu(where, data):
    test_any_shape_layout_and_dtype.hypothesis.inner_test(where, data)
