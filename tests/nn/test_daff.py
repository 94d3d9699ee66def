"""DAFF: the published layers, what the class token takes part in, norms of every kind, grids and errors."""

import copy

import pytest
import torch
from helpers import counted_linear
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fastib import _native
from fastib.nn import DAFF


def shaken(*args, **kwargs) -> DAFF:
    """In float64, parameters and running statistics away from where they start."""
    torch.manual_seed(0)
    module = DAFF(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def tokens(batch: int, count: int, dim: int) -> torch.Tensor:
    x = torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def published(module: DAFF, x: torch.Tensor, grid: tuple[int, int], training: bool) -> torch.Tensor:
    """Layer by layer on NCHW maps, BatchNorm written out."""

    def norm(layer, y):
        mean, var = layer.running_mean, layer.running_var
        if training:
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        y = (y - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    batch, _, dim = x.shape
    y = x[:, 1:].transpose(1, 2).reshape(batch, dim, *grid)
    s = F.gelu(norm(module.norm1, F.conv2d(y, module.conv1.weight, module.conv1.bias)))
    hidden = s.shape[1]
    t = F.conv2d(s, module.conv2.weight, module.conv2.bias, padding=1, groups=hidden)
    y = F.conv2d(F.gelu(norm(module.norm2, t)) + s, module.conv3.weight, module.conv3.bias)
    y = norm(module.norm3, y)
    mean = y.mean((2, 3))
    weight = F.gelu(mean @ module.reduce.weight.T + module.reduce.bias) @ module.expand.weight.T + module.expand.bias
    return torch.cat([(x[:, 0] * weight)[:, None], y.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize(("dim", "count"), [(192, 325_680), (384, 1_278_048)])
def test_parameter_counts(dim, count):
    assert sum(p.numel() for p in DAFF(dim).parameters()) == count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dim", "hidden", "grid"), [(8, 20, (3, 5)), (12, None, (4, 4)), (4, 17, (1, 6)), (4, 3, (1, 1))]
)
def test_equals_the_published_layers(dim, hidden, grid, training):
    """Value, all gradients and the running statistics, in float64."""
    module = shaken(dim, hidden, grid).train(training)
    x = tokens(3, 1 + grid[0] * grid[1], dim)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    expected = published(module, x, grid, training)
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    exact = torch.autograd.grad((expected * weight).sum(), leaves)
    torch.testing.assert_close(gradients, exact, rtol=1e-7, atol=1e-9)
    for name, buffer in module.named_buffers():
        if not training:
            assert torch.equal(buffer, before[name])
    if training:
        y = x[:, 1:].transpose(1, 2).reshape(3, dim, *grid)
        y = F.conv2d(y, module.conv1.weight, module.conv1.bias)
        mean = 0.9 * before["norm1.running_mean"] + 0.1 * y.mean((0, 2, 3))
        var = 0.9 * before["norm1.running_var"] + 0.1 * y.var((0, 2, 3))
        torch.testing.assert_close(module.norm1.running_mean, mean, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(module.norm1.running_var, var, rtol=1e-10, atol=1e-11)
        assert module.norm1.num_batches_tracked == module.norm2.num_batches_tracked == 1


def test_the_class_token_is_only_weighed():
    """Its output is its input times a weight of the patches alone; patches do not see it."""
    module, x = shaken(8, 20, (3, 5)).eval(), tokens(2, 16, 8).detach()
    moved = x.clone()
    moved[:, 0] += torch.randn(2, 8, dtype=torch.float64)
    out, other = module(x), module(moved)
    assert torch.equal(out[:, 1:], other[:, 1:])
    torch.testing.assert_close(out[:, 0] / x[:, 0], other[:, 0] / moved[:, 0], rtol=1e-9, atol=1e-9)
    assert (out[:, 0] / x[:, 0]).min() < 0  # no sigmoid


def change(module: DAFF, kind: str) -> None:
    for norm in (module.norm1, module.norm2):
        if kind == "cumulative":
            norm.momentum = None
        elif kind == "no running statistics":
            norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, *3 * [None]
    if kind == "one frozen":
        module.norm2.eval()
    elif kind == "both frozen":
        module.norm1.eval(), module.norm2.eval()


@pytest.mark.parametrize("kind", ["plain", "cumulative", "no running statistics", "one frozen", "both frozen"])
def test_norms_of_every_kind_are_those_of_pytorch(kind):
    """Three steps of training and one of evaluation beside the same layers run by PyTorch: outputs and buffers."""
    fused, layers = shaken(8, 20, (3, 5)).train(), shaken(8, 20, (3, 5)).train()
    layers._can_fuse = lambda hidden: False
    for module in (fused, layers):
        change(module, kind)
    assert fused._can_fuse(torch.zeros(2, 15, 20)) is (kind != "one frozen")
    x = tokens(4, 16, 8).detach()
    for step in range(3):
        torch.testing.assert_close(fused(x + step), layers(x + step), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fused.eval()(x), layers.eval()(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(layers.named_buffers()), rtol=1e-9, atol=1e-10)


def test_synchronised_norms():
    """PyTorch's converter finds all three; in evaluation the numbers stay."""
    module, x = shaken(8, 20, (3, 5)).eval(), tokens(2, 16, 8)
    expected = module(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert [type(n) for n in (converted.norm1, converted.norm2, converted.norm3)] == 3 * [nn.SyncBatchNorm]
    torch.testing.assert_close(converted(x), expected, rtol=1e-10, atol=1e-11)


def test_other_grids():
    module = shaken(8, 20, (4, 4)).eval()
    x = tokens(2, 10, 8)
    other = shaken(8, 20, (3, 3)).eval()
    assert torch.equal(module(x), other(x))
    module.grid_size = (3, 5)
    with pytest.raises(ValueError, match=r"DAFF: x must have 1 \+ 3 x 5 tokens, got N=10; set grid_size"):
        module(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be 1 or more, got 0"),
        ({"dim": 8, "hidden_dim": 0}, "hidden_dim must be 1 or more, got 0"),
        ({"dim": 2}, "dim // reduction must be 1 or more, got 0"),
        ({"dim": 8, "reduction": 0}, "dim // reduction must be 1 or more, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"DAFF: {message}"):
        DAFF(**options)


def test_replaced_layers_and_hooks_are_run():
    """What stands in a layer's place, prunes it or listens to it is called: the fused operator gives way."""

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x = shaken(8, 20, (3, 5)), tokens(3, 16, 8)
    plain, names = published(module, x, (3, 5), True), []
    hooks = [layer.register_forward_hook(lambda *_, name=name: names.append(name))
             for name, layer in module.named_children()]  # fmt: skip
    torch.testing.assert_close(module(x), plain, rtol=1e-9, atol=1e-9)
    assert {"norm1", "conv2", "norm2"} <= set(names)
    for hook in hooks:
        hook.remove()

    prune.l1_unstructured(module.conv2, "weight", 0.5)
    assert (module.conv2.weight == 0).sum() == 90
    for _ in range(2):
        module(x).square().sum().backward()
    torch.testing.assert_close(module(x), published(module, x, (3, 5), True), rtol=1e-9, atol=1e-9)

    module = shaken(8, 20, (3, 5)).eval()
    wide = nn.Conv2d(20, 20, 3, padding=2, dilation=2, groups=20).double()
    wide.load_state_dict(module.conv2.state_dict())
    before, module.conv2 = module.conv2, wide
    s = F.gelu(module.norm1(module.conv1(x[:, 1:].transpose(1, 2).unflatten(2, (3, 5)))))
    y = module.norm3(module.conv3(F.gelu(module.norm2(wide(s))) + s)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x)[:, 1:], y, rtol=1e-9, atol=1e-9)
    module.conv2 = before

    doubled = Doubled(20, 20, 3, padding=1, groups=20).double()
    doubled.load_state_dict(module.conv2.state_dict())
    with torch.no_grad():
        module.conv2.weight.mul_(2), module.conv2.bias.mul_(2)
    expected = published(module, x, (3, 5), False)
    module.conv2 = doubled
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_own_products_equal_the_published_layers(monkeypatch, training):
    """In float32: value and all gradients, at most twice as far from float64 as the layers that PyTorch runs.

    In the mean square: gradients to biases before a norm are roundings of 0, and the largest one is a matter of chance.
    """
    exact, shapes = shaken(24, 70, (5, 6)).train(training), counted_linear(monkeypatch, "fastib.nn.daff")
    x = tokens(6, 31, 24).float().detach()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def results(module, backend, dtype):
        module.backend, leaf = backend, x.to(dtype).requires_grad_()
        out = module(leaf)
        return out, *torch.autograd.grad((out * weight).sum(), [leaf, *module.parameters()])

    expected = results(exact, "reference", torch.float64)
    assert not shapes
    module = copy.deepcopy(exact).float()
    plain = results(copy.deepcopy(module), "reference", torch.float32)
    own = results(module, None, torch.float32)
    assert shapes == ([(6, 30, 24), (6, 30, 70)] if _native.lib_available() else shapes)
    names = "out", "grad_x", *dict(module.named_parameters())
    for name, ours, same, true in zip(names, own, plain, expected, strict=True):
        error, reference = ((t.double() - true).square().mean().sqrt() for t in (ours, same))
        rounding = torch.finfo(torch.float32).eps / 2 * true.square().mean().sqrt()
        assert error <= 2 * reference + rounding, f"{name}: error {error:.3e}, the layers' {reference:.3e}"


def test_own_products_give_way(monkeypatch):
    """To hooks, pruned and replaced layers, autocast, and backend="reference", which has all derivatives."""
    shapes = counted_linear(monkeypatch, "fastib.nn.daff")
    module, x, names = shaken(8, 20, (3, 5)).float(), tokens(3, 16, 8).float().detach(), []
    expected = published(copy.deepcopy(module).double(), x.double(), (3, 5), True)
    for layer in (module.conv1, module.conv3):
        hook = layer.register_forward_hook(lambda *_, layer=layer: names.append(layer))
        torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-5)
        hook.remove()
    assert names == [module.conv1, module.conv3] and shapes == [(3, 15, 20), (3, 15, 8)]
    shapes.clear()
    prune.l1_unstructured(module.conv1, "weight", 0.5)
    module.conv3 = nn.Sequential(module.conv3)
    module(x).sum().backward()
    assert not shapes
    prune.remove(module.conv1, "weight")
    module.conv3 = module.conv3[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    module.backend = "reference"
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
    gradient.square().sum().backward()
    assert leaf.grad.abs().max() > 0 and not shapes
