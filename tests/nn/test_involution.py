"""Involution2d: the paper's parameters, its formula with plain convolutions, and the sizes that others stumble over."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastib.nn import Involution2d
from fastib.reference import involution_ref


@pytest.mark.parametrize(
    ("channels", "kernel", "count"),
    [(32, 3, 434), (64, 7, 4388), (128, 7, 17096), (256, 7, 67472), (512, 7, 268064)],
)
def test_parameter_counts(channels, kernel, count):
    assert sum(p.numel() for p in Involution2d(channels, kernel).parameters()) == count


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_formula(stride, dilation, memory_format):
    """Kernels from the pooled input, channels of the map ordered (group, row, column), at sizes that stride divides."""
    torch.manual_seed(0)
    module = Involution2d(32, 7, stride, dilation).double().train()
    x = torch.randn(2, 32, 8, 12, dtype=torch.float64).to(memory_format=memory_format)
    pooled = F.avg_pool2d(x, stride)
    hidden = F.conv2d(pooled, module.reduce.weight)
    mean, var = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), keepdim=True, unbiased=False)
    hidden = ((hidden - mean) / (var + module.norm.eps).sqrt()).relu()
    kernels = F.conv2d(hidden, module.span.weight, module.span.bias).view(2, 2, 7, 7, 8 // stride, 12 // stride)
    out = module(x)
    torch.testing.assert_close(out, involution_ref(x, kernels, stride=stride, dilation=dilation), rtol=1e-9, atol=1e-9)
    assert out.is_contiguous(memory_format=memory_format)


def cells(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Means of stride x stride cells, of what there is of them at the lower and right edge."""
    rows = [x[:, :, i : i + stride].mean(2) for i in range(0, x.shape[2], stride)]
    x = torch.stack(rows, 2)
    return torch.stack([x[..., j : j + stride].mean(3) for j in range(0, x.shape[3], stride)], 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (15, 8), (13, 2), (26, 27)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (2, 3)])
def test_any_size_at_any_stride_and_dilation(size, stride, dilation):
    """The kernel map has as many places as the result; value and all gradients."""
    torch.manual_seed(0)
    module = Involution2d(16, 3, stride, dilation).double().eval()
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    kernels = module.span(module.norm(module.reduce(cells(x, stride))).relu()).unflatten(1, (1, 3, 3))
    expected = involution_ref(x, kernels, stride=stride, dilation=dilation)
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    grad_out = torch.randn_like(out)
    leaves = [x, *module.parameters()]
    gradients = (torch.autograd.grad(y, leaves, grad_out) for y in (out, expected))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_fewer_channels_than_a_group():
    """An RGB image: one group of all three channels."""
    torch.manual_seed(0)
    module, x = Involution2d(3).double().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    kernels = module.span(module.norm(module.reduce(x)).relu()).view(2, 1, 7, 7, 9, 9)
    torch.testing.assert_close(module(x), involution_ref(x, kernels), rtol=1e-9, atol=1e-10)


def test_trains_in_half_precision_and_channels_last():
    torch.manual_seed(0)
    module = Involution2d(32, 7, 2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = module(x)
        out.float().square().mean().backward()
        assert out.dtype == dtype and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


def test_other_layers_between():
    torch.manual_seed(0)
    module = Involution2d(32, 5, norm_layer=nn.InstanceNorm2d, act_layer=nn.GELU, reduction=100).double()
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64)
    hidden = module.reduce(x)
    assert hidden.shape[1] == 1
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
    kernels = module.span(F.gelu(hidden)).view(1, 2, 5, 5, 6, 6)
    torch.testing.assert_close(module(x), involution_ref(x, kernels), rtol=1e-9, atol=1e-10)
    assert "kernel_size=5, groups=2, stride=1, dilation=1" in repr(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 24}, "channels must be a multiple of group_channels=16, got 24"),
        ({"channels": 0}, "channels must be 1 or more, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"kernel_size": -1}, "kernel_size must be odd and positive, got -1"),
        ({"stride": 0}, "stride must be 1 or more, got 0"),
        ({"dilation": 0}, "dilation must be 1 or more, got 0"),
        ({"group_channels": 0}, "group_channels must be 1 or more, got 0"),
        ({"reduction": 0}, "reduction must be 1 or more, got 0"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match="^Involution2d: " + message):
        Involution2d(**{"channels": 32, **change})
