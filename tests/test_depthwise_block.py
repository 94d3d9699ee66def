"""depthwise_block against float64: values, gradients, statistics, layouts, sizes, errors, and inside PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    Target,
    assert_twofold,
    check_operator,
    expanded,
    max_error,
    on_device,
    sliced,
    transposed_rows,
    value_and_grads,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastib
from fastib import _native
from fastib.ops import depthwise_block
from fastib.reference import depthwise_block_ref

NAMES = ("grad_x", "grad_gamma1", "grad_beta1", "grad_weight", "grad_bias", "grad_gamma2", "grad_beta2")
GRIDS = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 5), (8, 8), (14, 14), (9, 16)]
CHANNELS = (1, 3, 8, 16, 17, 63, 64, 65, 130)


def draw(batch, grid, channels, dtype, seed=0):
    """x and the parameters, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    parameters = [1 + numbers(channels) / 4, numbers(channels) / 2, numbers(channels, 1, 3, 3) / 3, numbers(channels),
                  1 + numbers(channels) / 4, numbers(channels) / 2]  # fmt: skip
    places = grid[0] * grid[1]
    x = (1.5 * numbers(batch, places, channels) + numbers(channels)).to(dtype)
    return [x, *(p.to(wide) for p in parameters)], numbers(batch, places, channels).to(dtype)


def constants(channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    statistics = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    statistics[1::2] = 0.5 + torch.rand(2, channels, generator=generator, dtype=torch.float64)
    return statistics.to(torch.promote_types(dtype, torch.float32))


def steps(x, gamma1, beta1, weight, bias, gamma2, beta2, grid, statistics=None, round=lambda t: t):
    """The result in float64 with its roundings: of normalised values, of s, of each tap's share, and of both GELUs."""

    def norm(y, gamma, beta, place):
        mean, var = y.mean((0, 1)), y.var((0, 1), unbiased=False)
        if statistics is not None:
            mean, var = statistics[2 * place].double(), statistics[2 * place + 1].double()
        return round(round((y - mean) * (var + 1e-5).rsqrt()) * gamma + beta)

    s = round(F.gelu(norm(x, gamma1, beta1, 0)))
    maps = F.pad(s.transpose(1, 2).unflatten(2, grid), (1, 1, 1, 1))
    conv = bias[:, None, None].expand(len(x), -1, *grid)
    for k in range(9):
        window = maps[:, :, k // 3 : k // 3 + grid[0], k % 3 : k % 3 + grid[1]]
        conv = conv + round(window * weight[:, :, k // 3, k % 3, None])
    return round(F.gelu(norm(round(conv).flatten(2).transpose(1, 2), gamma2, beta2, 1)) + s)


def check(target: Target, inputs, grad_out, grid, statistics=None):
    def at(t):
        return t if t is None else on_device(t, target.device)

    check_operator(
        lambda *t: depthwise_block(*t, grid, statistics=at(statistics), backend=target.backend)[0],
        lambda *t: depthwise_block_ref(*t, grid, statistics=None if statistics is None else statistics.to(t[1]))[0],
        lambda *t, **options: steps(*t, grid, statistics, **options),
        [at(t) for t in inputs], at(grad_out), inputs[0].dtype, NAMES,
    )  # fmt: skip


def test_the_reference_is_its_formula():
    """By hand, number by number."""
    (x, gamma1, beta1, weight, bias, gamma2, beta2), _ = draw(2, (2, 3), 3, torch.float64)
    u = torch.empty_like(x)
    for c in range(3):
        values = x[:, :, c]
        mean = values.sum() / 12
        u[:, :, c] = (values - mean) / (((values - mean) ** 2).sum() / 12 + 1e-5) ** 0.5 * gamma1[c] + beta1[c]
    s = u * 0.5 * (1 + torch.erf(u / 2**0.5))
    conv = bias.expand(2, 6, 3).clone()
    for b, i, j, di, dj, c in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 3, 3, 3))).tolist():
        row, column = i + di - 1, j + dj - 1
        if 0 <= row < 2 and 0 <= column < 3:
            conv[b, 3 * i + j, c] += weight[c, 0, di, dj] * s[b, 3 * row + column, c]
    mean, var = conv.mean((0, 1)), conv.var((0, 1), unbiased=False)
    u = (conv - mean) / (var + 1e-5).sqrt() * gamma2 + beta2
    out, used = depthwise_block_ref(x, gamma1, beta1, weight, bias, gamma2, beta2, (2, 3))
    torch.testing.assert_close(out, u * 0.5 * (1 + torch.erf(u / 2**0.5)) + s, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(used[2:], torch.stack([mean, var]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(used[0], x.mean((0, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_grids(target, grid, evaluation, dtype):
    inputs, grad_out = draw(11 if grid == (1, 1) else 3, grid, 20, dtype)
    check(target, inputs, grad_out, grid, constants(20, dtype) if evaluation else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(target, channels, dtype):
    """Whole vectors and parts of them, several units, more than one group of images."""
    check(target, *draw(9, (3, 4), channels, dtype), (3, 4))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_statistics_of_the_batch(target, dtype):
    """In float32 whatever x is, also where the mean is far from 0; and they carry no gradient."""
    inputs, _ = draw(9, (4, 5), 70, dtype)
    inputs[0] = inputs[0] + 100
    wide = [t.double() for t in inputs]
    exact = depthwise_block_ref(*wide, (4, 5))[1]
    x = [t.to(target.device).requires_grad_() for t in inputs]
    _, used = depthwise_block(*x, (4, 5), backend=target.backend)
    assert used.dtype == torch.float32 and not used.requires_grad
    torch.testing.assert_close(used.cpu().double()[:2], exact[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(used.cpu().double()[2:], exact[2:], rtol=1e-3, atol=1e-3)
    given_back = depthwise_block(*x, (4, 5), statistics=used, backend=target.backend)
    assert torch.equal(given_back[1], used)
    torch.testing.assert_close(given_back[0], depthwise_block(*x, (4, 5), backend=target.backend)[0])


def test_maps_that_are_constant(target):
    """The mean of 196 equal numbers is that number; what a sum of them loses would be all that the norm divides."""
    (x, *parameters), _ = draw(4, (14, 14), 20, torch.float32)
    x = x[:1, :1].expand(x.shape)
    run = [t.to(target.device) for t in (x, *parameters)]
    out, used = depthwise_block(*run, (14, 14), backend=target.backend)
    same_out, same_used = depthwise_block_ref(x, *parameters, (14, 14))
    exact_out, exact_used = depthwise_block_ref(x.double(), *(p.double() for p in parameters), (14, 14))
    assert_twofold(used[0], same_used[0], exact_used[0], torch.float32, name="mean")
    assert_twofold(out, same_out, exact_out, torch.float32, name="value")


def test_gelu_and_its_slope_over_all_numbers(target):
    """Norms that change nothing and taps of 0 leave GELU(x), whose error is measured in parts of |x|."""
    x = torch.cat((torch.arange(-12, 12, 1e-3), torch.tensor([-1e30, -40.0, -1e-30, 0.0, 1e-30, 40.0, 1e30, 3e38])))
    x = x.reshape(1, -1, 8)
    one, zero = torch.ones(8), torch.zeros(8)
    parameters = [t.to(target.device) for t in (one, zero, torch.zeros(8, 1, 3, 3), zero, one, zero)]
    statistics = torch.stack((zero, one, zero, one)).to(target.device)

    def block(x):
        return depthwise_block(x, *parameters, (1, x.shape[1]), statistics=statistics, eps=(0.0, 0.0),
                               backend=target.backend)[0]  # fmt: skip

    def of(function, x):
        x = x.requires_grad_()
        y = function(x)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach().cpu().double() / x.detach().cpu().double().abs().clamp(min=1e-45), slope.cpu().double()

    results = of(block, x.to(target.device)), of(F.gelu, x.clone()), of(F.gelu, x.double())
    for name, ours, same, exact in zip(("value over |x|", "slope"), *results, strict=True):
        assert (ours - exact).abs().max() <= 2 * (same - exact).abs().max(), name


def test_variance_of_maps_far_from_zero(target):
    """Where a mean is 1e5 deviations, what rounds the mean of an image must not round the variance of all."""
    (x, *parameters), _ = draw(4, (14, 14), 20, torch.float32)
    x = 100 + x / 1000
    _, used = depthwise_block(x.to(target.device), *(p.to(target.device) for p in parameters), (14, 14),
                              backend=target.backend)  # fmt: skip
    exact = x.double().flatten(0, 1).var(0, unbiased=False)
    assert max_error(used[1] / exact.to(used), torch.ones(20)) < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", ["sliced", "columns", "expanded", "grad_expanded", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts(target, layout, dtype):
    inputs, grad_out = draw(3, (3, 4), 20, dtype)
    if layout == "sliced":
        inputs, grad_out = [sliced(t) for t in inputs], sliced(grad_out)
    elif layout == "columns":
        inputs[0], grad_out = transposed_rows(inputs[0]), transposed_rows(grad_out)
        inputs[3] = transposed_rows(inputs[3])
    elif layout == "expanded":
        inputs[0] = expanded(inputs[0])
    elif layout == "grad_expanded":
        grad_out = grad_out[:1, :1, :1].expand(grad_out.shape)
    else:
        inputs[0] = inputs[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check(target, inputs, grad_out, (3, 4))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 10), rows=st.integers(1, 9), columns=st.integers(1, 9), channels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES), evaluation=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_drawn(target, batch, rows, columns, channels, dtype, evaluation, seed):
    if (target.device == "cuda" and dtype == torch.float64) or (not evaluation and batch * rows * columns < 8):
        return  # with few values a variance may be almost 0, and nothing is well conditioned
    inputs, grad_out = draw(batch, (rows, columns), channels, dtype, seed)
    check(target, inputs, grad_out, (rows, columns), constants(channels, dtype) if evaluation else None)


@pytest.mark.parametrize("evaluation", [False, True])
def test_gradcheck(target, evaluation):
    if target.device == "cuda":
        pytest.skip("float64 on the GPU is the reference")
    inputs, _ = draw(2, (2, 3), 3, torch.float64)
    statistics = constants(3, torch.float64) if evaluation else None
    torch.autograd.gradcheck(
        lambda *t: depthwise_block(*t, (2, 3), statistics=statistics, backend=target.backend)[0],
        [t.requires_grad_() for t in inputs],
    )


@pytest.mark.parametrize("shape", [(0, (3, 4), 5), (2, (0, 4), 5), (2, (3, 4), 0), (0, (0, 0), 0)])
def test_sizes_of_zero(target, shape):
    inputs, grad_out = draw(*shape, torch.float32)
    statistics = constants(shape[2])
    place = [t.to(target.device) for t in (*inputs, grad_out)]
    for backend in (target.backend, "reference"):
        options = {"statistics": statistics.to(target.device), "backend": backend}
        actual = value_and_grads(lambda *t: depthwise_block(*t, shape[1], **options)[0], place[:-1], place[-1])  # noqa: B023
        for a, b in zip(actual, (inputs[0], *inputs), strict=True):
            assert a.shape == b.shape and not a.any()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_two_runs_and_any_number_of_threads_agree(target, poisoned_memory, restored_threads, dtype):
    check_runs(target, draw(19, (5, 3), 70, dtype), (5, 3), (1, 2, 16, 1))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_larger_than_the_caches(target, poisoned_memory, restored_threads, dtype):
    if target.backend != "cpu":
        pytest.skip("stores of the CPU kernels")
    check_runs(target, draw(26, (16, 16), 240, dtype), (16, 16), (2, 16))


def check_runs(target, problem, grid, numbers_of_threads):
    """Units of work are whole batches of a few channels where that gives each thread one, else images."""
    inputs, grad_out = [t.to(target.device) for t in problem[0]], problem[1].to(target.device)
    results = []
    for threads in numbers_of_threads:
        torch.set_num_threads(threads)
        results.append(value_and_grads(
            lambda *t: depthwise_block(*t, grid, backend=target.backend)[0], inputs, grad_out))  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(results[0], other, strict=True))


def test_autocast_and_parameters_of_other_dtypes(target):
    inputs, _ = draw(3, (3, 4), 20, torch.float32)
    inputs = [t.to(target.device) for t in inputs]
    with torch.autocast(target.device, dtype=torch.bfloat16):
        low, used = depthwise_block(*inputs, (3, 4), backend=target.backend)
    assert low.dtype == torch.bfloat16 and used.dtype == torch.float32
    expected = depthwise_block(inputs[0].bfloat16(), *inputs[1:], (3, 4), backend=target.backend)[0]
    assert torch.equal(low, expected)
    half = [inputs[0], *(t.bfloat16().requires_grad_() for t in inputs[1:])]
    out, _ = depthwise_block(*half, (3, 4), backend=target.backend)
    assert torch.equal(out, depthwise_block(inputs[0], *(t.float() for t in half[1:]), (3, 4),
                                            backend=target.backend)[0])  # fmt: skip
    out.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in half[1:])


@pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "-")
def test_compile_and_opcheck():
    inputs, grad_out = draw(3, (3, 4), 20, torch.float32)

    def function(*t):
        return depthwise_block(t[0] * 1.5, *t[1:], (3, 4))[0].sin()

    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(value_and_grads(compiled, inputs, grad_out), value_and_grads(function, inputs, grad_out),
                    strict=True):  # fmt: skip
        assert max_error(a, b) <= 2e-5 * max(1.0, b.abs().max().item())
    torch.compiler.reset()
    for statistics in (None, constants(20)):
        arguments = (*(t.requires_grad_() for t in inputs), statistics, 3, 4, 1e-5, 1e-5)
        torch.library.opcheck(torch.ops.fastib.depthwise_block.default, arguments)


def test_second_derivative():
    inputs = [t.requires_grad_() for t in draw(2, (2, 3), 3, torch.float64)[0]]
    out, _ = depthwise_block(*inputs, (2, 3))
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    if _native.lib_available():
        with pytest.raises(RuntimeError, match="no second derivative; pass backend='reference'"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 12)}, r"x must be of shape \(B, P, C\), got \(2, 12\)"),
        ({0: torch.zeros(2, 11, 5)}, r"x must be of P=12 places, those of grid_size, got P=11"),
        ({0: torch.zeros(2, 12, 5, dtype=torch.int32)}, r"x must be float32.*got torch.int32"),
        ({0: torch.zeros(0, 12, 5)}, r"x must be of at least one image and place where its statistics"),
        ({1: torch.zeros(4)}, r"gamma1 must be of shape \(5,\), as x is \(2, 12, 5\), got \(4,\)"),
        ({3: torch.zeros(5, 3, 3)}, r"weight must be of shape \(5, 1, 3, 3\).*got \(5, 3, 3\)"),
        ({6: torch.zeros(5, dtype=torch.int64)}, r"beta2 must be floating point, got torch.int64"),
        ({"grid_size": (3, 4.0)}, r"grid_size must be an int or a pair .*got \(3, 4.0\)"),
        ({"grid_size": (-3, -4)}, r"grid_size must be an int or a pair .*got \(-3, -4\)"),
        ({"statistics": torch.zeros(5, 4)}, r"statistics must be of shape \(4, 5\).*got \(5, 4\)"),
        ({"eps": 1e-5}, r"eps must be a pair of numbers, got 1e-05"),
        ({"eps": (1e-5, float("nan"))}, r"eps must be a finite number, got nan"),
        ({"eps": (-1.0, 0.0)}, r"eps must be 0 or more, got -1.0"),
        ({"backend": "gpu"}, r"backend must be None or one of .*got 'gpu'"),
    ],
)
def test_value_errors(change, message):
    inputs = draw(2, (3, 4), 5, torch.float32)[0]
    options = {"grid_size": (3, 4)}
    for key, value in change.items():
        if isinstance(key, int):
            inputs[key] = value
        else:
            options[key] = value
    with pytest.raises(ValueError, match="^depthwise_block: " + message):
        depthwise_block(*inputs, options.pop("grid_size"), **options)


def test_device_and_backend_errors():
    inputs = draw(2, (3, 4), 5, torch.float32)[0]
    with pytest.raises(RuntimeError, match=r"backend='cuda' is not available: the GPU implementation .* is 'triton'"):
        depthwise_block(*inputs, (3, 4), backend="cuda")
    inputs[4] = inputs[4].to("meta")
    with pytest.raises(RuntimeError, match=r"^depthwise_block: bias must be on cpu like the other inputs, got meta"):
        depthwise_block(*inputs, (3, 4))
    assert fastib.backends()["depthwise_block"]["reference"] is True


@pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "-")
def test_native_operator_checks_for_itself():
    good = [*draw(2, (3, 4), 5, torch.float32)[0], None, 3, 4, 1e-5, 1e-5]
    torch.ops.fastib.depthwise_block(*good)
    bad = {0: good[0][0], 1: good[1].double(), 3: good[3][:, 0], 4: good[4][:2], 7: torch.zeros(3, 5), 8: 4, 9: -4}
    for position, value in bad.items():
        with pytest.raises(RuntimeError):
            torch.ops.fastib.depthwise_block(*good[:position], value, *good[position + 1 :])
