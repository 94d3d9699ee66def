"""The CUDA kernels of generalized_conv without a GPU: their bodies on the host, and what nvcc makes of them."""

import ctypes
import re

import pytest
import torch
from cuda_tools import ARCHS, compiled_kernels, host_function

from fastib.ops import generalized_conv
from fastib.reference.generalized_conv import generalized_conv_shift_ref


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """shift(x, out, heads, inverse, last) -> the name of the body that filled `out`."""
    function = host_function("generalized_conv_on_host", tmp_path_factory.mktemp("bodies"))

    def shift(x, out, heads, inverse, last):
        sizes = x.element_size(), last, inverse, x.shape[0], heads, x.shape[1] // heads, *x.shape[2:]
        strides, name = (*x.stride(), *out.stride()), ctypes.create_string_buffer(1 << 12)
        function(
            (ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()),
            (ctypes.c_int64 * len(strides))(*strides), name, ctypes.c_int64(len(name)),
        )  # fmt: skip
        kind, pack = re.search(r"(\w+)Shift<[^,>]*, (\d+)>", name.value.decode()).groups()
        return kind, int(pack)

    return shift


def image(shape, dtype, last):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if last else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["columns", "channels"])
@pytest.mark.parametrize("size", [(14, 14), (28, 28), (7, 7), (8, 12), (1, 5), (3, 2), (2, 40)])
def test_bodies(on_host, size, last, dtype):
    """In packs as wide as rows or heads allow, with rows and columns that fill no tile; every element is written."""
    for heads, width in ((9, 32), (6, 64), (4, 24), (25, 3), (32, 1), (1, 16)):
        x = image((2, heads * width, *size), dtype, last)
        for inverse in (False, True):
            out = torch.full_like(x, torch.nan)
            kind, pack = on_host(x, out, heads, inverse, last)
            assert torch.equal(out, generalized_conv_shift_ref(x, heads, inverse)), (heads, inverse)
            whole = 16 // x.element_size()
            if last:
                assert (kind, pack) == ("Channels", 1 if width % whole else whole)
            else:
                assert (kind, pack) == ("Columns", next(n for n in (4, 2, 1) if size[1] % n == 0))


def test_tensors_that_begin_between_packs(on_host):
    """A slice that no pack is aligned with is moved element by element."""
    for last in (False, True):
        x = image((2, 72, 8, 8), torch.float32, last)
        memory = torch.full((x.numel() + 1,), torch.nan)
        shifted = memory[1:].as_strided(x.shape, x.stride()).copy_(x)
        out = torch.full((x.numel() + 1,), torch.nan)[1:].as_strided(x.shape, x.stride())
        assert on_host(shifted, out, 9, False, last)[1] == 1
        assert torch.equal(out, generalized_conv_shift_ref(x, 9))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_register_spills(arch, tmp_path):
    """nvcc compiles every kernel for the architecture; none spills, and none keeps an array in memory."""
    assert len(compiled_kernels("generalized_conv.cu", arch, tmp_path)) == 10


@pytest.mark.gpu
class TestOnGpu:
    """What only a GPU has: streams and graphs. The values are in test_generalized_conv.py."""

    @pytest.fixture(autouse=True)
    def gpu(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

    def test_current_stream(self):
        x = image((8, 288, 28, 28), torch.float32, True).cuda()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            out = torch.ops.fastib.generalized_conv_shift(late, 9, False)
        stream.synchronize()
        assert torch.equal(out.cpu(), generalized_conv_shift_ref(x.cpu(), 9))

    @pytest.mark.parametrize("last", [False, True])
    def test_cuda_graph(self, last):
        """A captured training step gives the values of the inputs at replay."""
        x = image((2, 72, 14, 14), torch.bfloat16, last).cuda().requires_grad_()
        weights = [torch.randn(72, 72, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        def step():
            x.grad = None
            out = generalized_conv(x, *weights, None, 9)
            out.backward(torch.ones_like(out))
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
            x.mul_(-0.5)
        graph.replay()
        replayed, gradient = out.clone(), x.grad.clone()
        expected = step()
        assert torch.equal(replayed, expected) and torch.equal(gradient, x.grad)
