"""involution's CUDA kernels without a GPU: their bodies on the host by value, and what nvcc makes of them."""

import ctypes
import re

import pytest
import torch
from cuda_tools import ARCHS, ROOT, compiled_kernels, host_function
from helpers import value_and_grads
from involution_problem import Problem, channels_last

from fastib.ops import involution
from fastib.reference import involution_ref

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # their numbers in kernels/common/dtype.h


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """run(backward, sizes, tensors) -> the names of the bodies that ran."""
    function = host_function("involution_on_host", tmp_path_factory.mktemp("bodies"))

    def run(backward, sizes, tensors):
        strides = [s for t in tensors for s in t.stride()]
        names = ctypes.create_string_buffer(1 << 14)
        function(
            ctypes.c_bool(backward), (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)),
            (ctypes.c_int64 * len(strides))(*strides), names, ctypes.c_int64(len(names)),
        )  # fmt: skip
        return re.findall(r"involution_cuda::(\w+)<", names.value.decode())

    return run


def call(on_host, problem, last):
    """(out, grad_x, grad_weight) and the bodies that made them; results are full of NaN before."""
    order = channels_last if last else lambda t: t.contiguous()
    x, weight, grad_out = map(order, (*problem.inputs, problem.grad_out))
    out, grad_x, grad_weight = (torch.full_like(t, torch.nan) for t in (grad_out, x, weight))
    sizes = (
        DTYPES[problem.dtype], last, *x.shape[:2], *weight.shape[1:3], *x.shape[2:], *weight.shape[4:],
        *problem.options.values(),
    )  # fmt: skip
    forward = on_host(False, sizes, (x, weight, out))
    backward = on_host(True, sizes, (x, weight, grad_out, grad_x, grad_weight))
    return (out, grad_x, grad_weight), [*forward, *backward]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["columns", "channels"])
@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 6), (14, 14), (7, 7), (13, 9), (1, 5), (3, 2), (2, 40)])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 1), (7, 2), (3, 1)])
def test_tiles(on_host, kernel, stride, size, last, dtype):
    """The sizes of image models, in packs of 4, 2 and 1 columns, with rows and columns that fill no tile."""
    problem = Problem(2, 32, 2, kernel, size, dtype, stride=stride)
    results, bodies = call(on_host, problem, last)
    problem.check_values(results)
    kind = "Channels" if last else "Columns"
    grad_x = f"{kind}GradX" if stride == 1 else "AnyGradX"
    assert bodies == [f"{kind}Forward", grad_x, f"{kind}GradWeight"]


@pytest.mark.parametrize("dtype", list(DTYPES)[:2], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["columns", "channels"])
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (5, 5), (40, 2), (48, 3), (17, 1), (64, 1)])
def test_group_sizes(on_host, channels, groups, last, dtype):
    for kernel in (3, 7):
        problem = Problem(1, channels, groups, kernel, (6, 8), dtype)
        problem.check_values(call(on_host, problem, last)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["columns", "channels"])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 1, 1), (5, 1, 1), (9, 2, 1), (3, 2, 1), (7, 1, 2), (7, 2, 2), (3, 3, 2)]
)
def test_any_kernel(on_host, kernel, stride, dilation, last, dtype):
    problem = Problem(2, 8, 2, kernel, (9, 8), dtype, stride=stride, dilation=dilation)
    results, bodies = call(on_host, problem, last)
    problem.check_values(results)
    assert bodies == ["AnyForward", "AnyGradX", "AnyGradWeight"]


def test_tensors_that_begin_between_packs(on_host):
    """A slice that no pack of four is aligned with takes smaller packs."""
    problem = Problem(2, 32, 2, 7, (8, 8), torch.float32)
    x, weight = problem.inputs
    expected = involution_ref(x.double(), weight.double())
    for offset in (1, 2):
        shifted = torch.full((x.numel() + offset,), torch.nan)[offset:].view_as(x).copy_(x)
        out = torch.full_like(x, torch.nan)
        on_host(False, (0, 0, 2, 32, 2, 7, 8, 8, 8, 8, 1, 1), (shifted, weight, out))
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_taps_that_fill_no_whole_words(on_host):
    """Taps with their channels apart, or beginning between two words, take the body for any memory."""
    problem = Problem(2, 48, 3, 7, (5, 6), torch.bfloat16)
    x, weight = map(channels_last, problem.inputs)
    expected = involution_ref(x.double(), weight.double())
    wide = torch.full((*weight.shape[:1], 5, *weight.shape[2:]), torch.nan, dtype=weight.dtype)
    apart = channels_last(wide)[:, 1:4].copy_(weight)
    dense = weight.permute(0, 4, 5, 1, 2, 3)
    between = torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view(dense.shape).copy_(dense)
    for taps, body in ((weight, "Channels"), (apart, "Any"), (between.permute(0, 3, 4, 5, 1, 2), "Any")):
        out = torch.full_like(x, torch.nan)
        names = on_host(False, (1, 1, 2, 48, 3, 7, 5, 6, 5, 6, 1, 1), (x, taps, out))
        assert names == [f"{body}Forward"]
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)


def test_more_taps_than_shared_memory(on_host):
    """Groups of four channels have four times the taps of groups of sixteen."""
    problem = Problem(1, 64, 16, 7, (6, 8), torch.float32)
    results, bodies = call(on_host, problem, True)
    problem.check_values(results)
    assert bodies == ["AnyForward", "AnyGradX", "AnyGradWeight"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "kernels/cuda").glob("involution*.cu")))
def test_no_register_spills(source, arch, tmp_path):
    """nvcc compiles every kernel for the architecture; none spills, and none keeps an array in memory."""
    assert len(compiled_kernels(source, arch, tmp_path)) >= 20


@pytest.mark.gpu
class TestOnGpu:
    """What only a GPU has: streams, graphs, several devices. The values are in test_involution.py."""

    @pytest.fixture(autouse=True)
    def gpu(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

    def test_current_stream(self):
        """The kernels wait for what the stream they are called on does before them."""
        problem = Problem(8, 64, 4, 7, (28, 28), torch.float32)
        x, weight = (t.cuda() for t in problem.inputs)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            out = involution(late, weight)
        stream.synchronize()
        assert torch.equal(out, involution(x, weight))

    @pytest.mark.parametrize("last", [False, True])
    def test_cuda_graph(self, last):
        """A captured training step gives the values of the inputs at replay."""
        problem = Problem(2, 32, 2, 7, (14, 14), torch.bfloat16)
        order = channels_last if last else lambda t: t
        x, weight, grad_out = (order(t).cuda() for t in (*problem.inputs, problem.grad_out))
        x.requires_grad_(), weight.requires_grad_()

        def step():
            x.grad = weight.grad = None
            out = involution(x, weight)
            out.backward(grad_out)
            return out

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        with torch.no_grad():
            x.mul_(-0.5), weight.add_(1.0)
        graph.replay()
        expected = value_and_grads(involution, [x.detach(), weight.detach()], grad_out)
        for a, b in zip((out, x.grad, weight.grad), expected, strict=True):
            assert torch.equal(a, b)

    def test_another_device(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        problem = Problem(2, 32, 2, 3, (9, 9), torch.float32)
        out = involution(*(t.to("cuda:1") for t in problem.inputs))
        assert out.device.index == 1 and torch.equal(out.cpu(), involution(*(t.cuda() for t in problem.inputs)).cpu())

    def test_memory(self):
        """A training step takes its results and nothing else."""
        problem = Problem(8, 64, 4, 7, (56, 56), torch.bfloat16)
        x, weight = (t.cuda().requires_grad_() for t in problem.inputs)
        grad_out = problem.grad_out.cuda()
        results = sum(t.numel() * t.element_size() for t in (grad_out, x, weight))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = involution(x, weight)
        kept = (out, *torch.autograd.grad(out, (x, weight), grad_out))
        assert torch.cuda.max_memory_allocated() - before <= results + 2**21 and len(kept) == 3
