"""The compiled library itself: its operators called with bad tensors, its NumPy module, and what it reports."""

import importlib

import numpy as np
import pytest
import torch

import fastib
from fastib import _native
from fastib.reference.mhca_attention import mhca_attention_ref
from fastib.reference.philox import keep_mask

pytestmark = pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "available")

B, H, GRID, PREFIX, D = 2, 3, (3, 4), 1, 8
N = PREFIX + GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("fastib._kernels", reason="built without Python.h")


def arguments(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    values = {name: torch.randn(B, H, N, D, dtype=dtype) for name in ("grad_out", "q", "k", "v")}
    values |= {"alpha": torch.rand(H, dtype=sums), "center": torch.randn(H, 2, dtype=sums)}
    values |= {"out": torch.randn(B, H, N, D, dtype=dtype), "stats": torch.randn(B, H, 2, N, dtype=sums), "seed": None}
    values |= {"grid_h": GRID[0], "grid_w": GRID[1], "num_prefix_tokens": PREFIX, "scale": 0.3}
    return values | {"rpe_dropout": 0.0, "attn_dropout": 0.0} | changes


def forward(**values):
    names = [a.name for a in torch.ops.fastib.mhca_attention.default._schema.arguments]
    return torch.ops.fastib.mhca_attention(**{name: values[name] for name in names})


def backward(**values):
    return torch.ops.fastib.mhca_attention_backward(**values)


SEED = torch.tensor([5])
BAD = {
    "q of three dimensions": ({"q": torch.randn(H, N, D)}, "q must have shape"),
    "q of integers": ({"q": torch.ones(B, H, N, D, dtype=torch.int64)}, "q must be float32"),
    "k shorter": ({"k": torch.randn(B, H, N - 1, D)}, "k must have shape"),
    "k of another dtype": ({"k": torch.randn(B, H, N, D).double()}, "k must be Float"),
    "v of other heads": ({"v": torch.randn(B, H + 1, N, D)}, "v must have shape"),
    "v sparse": ({"v": torch.randn(B, H, N, D).to_sparse()}, "v|Sparse"),
    "alpha of half the heads": ({"alpha": torch.rand(H - 1)}, "alpha must have shape"),
    "alpha of q's dtype": ({"alpha": torch.rand(H).bfloat16()}, "alpha must be Float"),
    "center of one column": ({"center": torch.rand(H, 1)}, "center must have shape"),
    "grid too small": ({"grid_h": 2}, "grid_h \\* grid_w"),
    "grid negative": ({"grid_h": -3, "grid_w": -4}, "negative"),
    "grid that overflows": ({"grid_h": 2**62, "grid_w": 4, "num_prefix_tokens": N}, "grid_h \\* grid_w"),
    "prefix negative": ({"num_prefix_tokens": -1}, "num_prefix_tokens"),
    "prefix beyond N": ({"num_prefix_tokens": N + 1, "grid_h": 0, "grid_w": 0}, "num_prefix_tokens"),
    "probability above 1": ({"rpe_dropout": 1.5, "seed": SEED}, "rpe_dropout must be in"),
    "probability not a number": ({"attn_dropout": float("nan"), "seed": SEED}, "attn_dropout must be in"),
    "dropout without seed": ({"attn_dropout": 0.1}, "seed must be given"),
    "empty seed": ({"attn_dropout": 0.1, "seed": torch.empty(0, dtype=torch.int64)}, "seed must have one element"),
    "seed of two": ({"rpe_dropout": 0.1, "seed": torch.tensor([1, 2])}, "seed must have one element"),
    "seed of int32": ({"rpe_dropout": 0.1, "seed": torch.tensor([1], dtype=torch.int32)}, "seed must be Long"),
    "seed of floats": ({"rpe_dropout": 0.1, "seed": torch.tensor([1.0])}, "seed must be Long"),
}
BAD_BACKWARD = {
    "grad_out shorter": ({"grad_out": torch.randn(B, H, N - 1, D)}, "grad_out must have shape"),
    "grad_out of another dtype": ({"grad_out": torch.randn(B, H, N, D).half()}, "grad_out must be Float"),
    "out of other heads": ({"out": torch.randn(B, 1, N, D)}, "out must have shape"),
    "stats of another shape": ({"stats": torch.randn(B, H)}, "stats must have shape"),
    "stats of another dtype": ({"stats": torch.randn(B, H, 2, N).double()}, "stats must be Float"),
}


@pytest.mark.parametrize("case", BAD)
def test_operators_refuse_what_they_could_not_read(case):
    changes, message = BAD[case]
    for operator in (forward, backward):
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            operator(**arguments(**changes))


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_the_backward_refuses_what_it_could_not_read(case):
    changes, message = BAD_BACKWARD[case]
    with pytest.raises(RuntimeError, match=message):
        backward(**arguments(**changes))


def test_a_tensor_whose_storage_was_freed_is_refused():
    values = arguments()
    values["v"].untyped_storage().resize_(4 * 100)
    with pytest.raises(RuntimeError, match="v reaches beyond its storage"):
        forward(**values)


@pytest.mark.parametrize("shape", [(0, H, N, D), (B, 0, N, D), (B, H, N, 0)])
def test_sizes_of_zero(shape):
    values = arguments()
    for name in ("q", "k", "v", "grad_out", "out"):
        values[name] = torch.randn(shape)
    heads = shape[1]
    values |= {
        "alpha": torch.rand(heads),
        "center": torch.rand(heads, 2),
        "stats": torch.randn(*shape[:2], 2, shape[2]),
    }
    out, stats = forward(**values)
    assert out.shape == shape and stats.shape == (*shape[:2], 2, shape[2])
    gradients = backward(**values)
    assert [tuple(g.shape) for g in gradients] == [shape, shape, shape, (heads,), (heads, 2)]
    assert all((g == 0).all() for g in gradients)


def test_no_tokens_and_prefix_tokens_alone():
    values = arguments(grid_h=0, grid_w=7, num_prefix_tokens=0, stats=torch.randn(B, H, 2, 0))
    for name in ("q", "k", "v", "grad_out", "out"):
        values[name] = torch.randn(B, H, 0, D)
    assert forward(**values)[0].shape == (B, H, 0, D)
    assert (backward(**values)[3] == 0).all()

    values = arguments(torch.float64, grid_h=5, grid_w=0, num_prefix_tokens=N)
    out, _ = forward(**values)
    plain = torch.nn.functional.scaled_dot_product_attention(*(values[name] for name in "qkv"), scale=0.3)
    torch.testing.assert_close(out, plain)


def test_layout_of_results():
    values = arguments()
    dense = torch.empty(B, N, H, D).transpose(1, 2)
    out, stats = forward(**values)
    for x in (out, *backward(**values)[:3]):
        assert x.shape == dense.shape and x.stride() == dense.stride()
    assert stats.is_contiguous()


def test_any_strides_come_in():
    plain = arguments(torch.float64)
    expected = (*forward(**plain), *backward(**plain))
    awkward = dict(plain)
    for name in ("q", "k", "v", "grad_out", "out"):
        awkward[name] = plain[name].transpose(2, 3).contiguous().transpose(2, 3)
    awkward["stats"] = plain["stats"].transpose(1, 2).contiguous().transpose(1, 2)
    awkward["alpha"] = plain["alpha"].repeat_interleave(2)[::2]
    awkward["center"] = plain["center"].t().contiguous().t()
    for got, want in zip((*forward(**awkward), *backward(**awkward)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    expanded = plain | {name: plain[name][:1].expand(B, H, N, D) for name in "qkv"}
    copied = plain | {name: expanded[name].contiguous() for name in "qkv"}
    torch.testing.assert_close(forward(**expanded)[0], forward(**copied)[0], rtol=0, atol=0)


def test_every_instruction_set_gives_the_same_numbers(kernels):
    used = kernels.cpu_isa()
    assert used == kernels.cpu_isas()[-1]
    values = arguments(torch.float64)
    expected = mhca_attention_ref(
        *(values[name] for name in ("q", "k", "v", "alpha", "center")), GRID, num_prefix_tokens=PREFIX, scale=0.3
    )
    try:
        for isa in kernels.cpu_isas():
            kernels.set_cpu_isa(isa)
            assert fastib.build_info()["cpu_isa"] == isa
            torch.testing.assert_close(forward(**values)[0], expected, rtol=1e-12, atol=1e-12)
    finally:
        kernels.set_cpu_isa(used)
    with pytest.raises(ValueError, match="nonsense"):
        kernels.set_cpu_isa("nonsense")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint16])
def test_numpy_kernels_agree_with_the_operators(kernels, dtype):
    torch_dtype = {np.uint16: torch.bfloat16, np.float16: torch.float16}.get(dtype) or torch.from_numpy(
        np.empty(0, dtype)
    ).dtype
    values = arguments(torch_dtype, seed=torch.tensor([77]), rpe_dropout=0.2, attn_dropout=0.3)

    def to_numpy(x):
        return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()

    names = ("q", "k", "v", "alpha", "center", "grid_h", "grid_w", "num_prefix_tokens", "scale")
    options = {name: values[name] for name in (*names, "rpe_dropout", "attn_dropout")}
    options = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    problem = kernels.MhcaAttention(**options, seed=77)
    out, stats = problem.forward()
    expected_out, expected_stats = forward(**values)
    np.testing.assert_array_equal(out, to_numpy(expected_out.contiguous()))
    np.testing.assert_array_equal(stats, expected_stats.numpy())
    gradients = problem.backward(to_numpy(values["grad_out"]), out, stats)
    values |= {"out": expected_out, "stats": expected_stats}
    for got, want in zip(gradients, backward(**values), strict=True):
        np.testing.assert_array_equal(got, to_numpy(want.contiguous()))


def test_numpy_kernels_refuse_bad_arrays(kernels):
    q = np.zeros((B, H, N, D), np.float32)
    alpha, center = np.zeros(H, np.float32), np.zeros((H, 2), np.float32)
    good = {"q": q, "k": q, "v": q, "alpha": alpha, "center": center}
    good |= {"grid_h": 3, "grid_w": 4, "num_prefix_tokens": 1, "scale": 1.0}
    kernels.MhcaAttention(**good)
    bad = {"q": q[0], "k": q[:1], "v": q.astype(np.float64), "alpha": alpha[1:], "center": center[:, :1]}
    for name, value in (bad | {"grid_h": 2, "num_prefix_tokens": -1, "attn_dropout": 2.0}).items():
        with pytest.raises(ValueError):
            kernels.MhcaAttention(**(good | {name: value}))
    with pytest.raises(ValueError):
        kernels.MhcaAttention(**(good | {"q": q.astype(np.int32)}))


@pytest.mark.parametrize("stream", [0, 1])
def test_compiled_masks_equal_the_python_twin(kernels, stream):
    seed, p, count = -123456789012345678, 0.37, 4099
    twin = keep_mask(torch.tensor([seed]), (count,), p, stream)
    np.testing.assert_array_equal(kernels.keep_mask(seed % 2**64, stream, count, p), twin.numpy())


def test_build_info():
    info = fastib.build_info()
    assert info["native"] is True
    if importlib.util.find_spec("fastib._kernels") is None:
        pytest.skip("built without Python.h")
    assert set(info["cpu_isas_supported"]) <= set(info["cpu_isas_compiled"])
    assert info["cpu_isa"] in info["cpu_isas_supported"]
    assert "-ffast-math" not in info["flags"] and "march=native" not in info["flags"]
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
