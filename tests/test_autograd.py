"""What PyTorch asks of every operator: forward mode, a second derivative, checkpoints that end with it, any size."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastib import _native
from fastib.nn import DAFF, MHCA, HeadTokenAttention
from fastib.ops import (
    attention_link_loss,
    cls_attention_maps,
    depthwise_block,
    feature_alignment_loss,
    generalized_conv,
    head_token_attention,
    involution,
    mhca_attention,
)

pytestmark = pytest.mark.skipif(not _native.lib_available(), reason=_native.why_not() or "")


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def block(x: torch.Tensor, weight: torch.Tensor, **options):
    ones, zeros = weight.new_ones(weight.shape[0]), weight.new_zeros(weight.shape[0])
    return depthwise_block(x, ones, zeros, weight, zeros, ones, zeros, (2, 3), **options)[0]


ROWS = (2, 3, 10, 8)
TARGET, TEACHER = normal((2, 5, 9), (2, 3, 7))
# Of each operator a function of its differentiable inputs, and those.
OPERATORS = {
    "mhca": (lambda *x, **o: mhca_attention(*x, (3, 3), **o), normal(ROWS, ROWS, ROWS, (3,), (3, 2))),
    "head tokens": (head_token_attention, normal(*[ROWS] * 3, *[(2, 3, 2, 8)] * 3)),
    "cls": (cls_attention_maps, normal((2, 3, 8), ROWS)),
    "link": (lambda *x, **o: attention_link_loss(*x, TARGET, **o), normal((2, 4, 9), (5, 4), (5,))),
    "link none": (
        lambda *x, **o: attention_link_loss(*x, TARGET, reduction="none", **o), normal((2, 4, 9), (5, 4), (5,)),
    ),
    "alignment": (lambda x, **o: feature_alignment_loss(x, TEACHER, **o), normal((2, 6, 7))),
    "involution": (involution, normal((2, 4, 5, 6), (2, 2, 3, 3, 5, 6))),
    "depthwise block": (block, normal((2, 6, 4), (4, 1, 3, 3))),
    "generalized conv": (
        lambda *x, **o: generalized_conv(*x, None, num_heads=9, **o), normal((2, 4, 5, 6), (9, 4), (3, 9)),
    ),
}  # fmt: skip
ONCE = [name for name in OPERATORS if name != "generalized conv"]


def leaves(inputs):
    return [t.clone().requires_grad_() for t in inputs]


@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode(name):
    """It is the reference that runs, and a kernel that is asked for says that it cannot."""
    function, inputs = OPERATORS[name]
    tangents = tuple(t.flip(0).contiguous() for t in inputs)
    _, exact = torch.func.jvp(lambda *x: function(*x, backend="reference"), tuple(inputs), tangents)
    _, tangent = torch.func.jvp(function, tuple(inputs), tangents)
    torch.testing.assert_close(tangent, exact, rtol=1e-12, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*dual)).tangent
    torch.testing.assert_close(tangent, exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="backend='cpu' is not available: it has no forward-mode derivative"):
        torch.func.jvp(lambda *x: function(*x, backend="cpu"), tuple(inputs), tangents)


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms(name):
    """Under torch.func it is the reference that runs, with all its rules; a kernel that is asked for says why not."""
    function, inputs = OPERATORS[name]

    def loss(*x, **options):
        return function(*x, **options).square().sum()

    every = tuple(range(len(inputs)))
    plain = leaves(inputs)
    exact = torch.autograd.grad(loss(*plain, backend="reference"), plain)
    per_sample = torch.func.vmap(torch.func.grad(loss, every))(*(torch.stack((t, 2 * t)) for t in inputs))
    double = [(2 * t).detach().requires_grad_() for t in inputs]
    exact_double = torch.autograd.grad(loss(*double, backend="reference"), double)
    for i, gradient in enumerate(torch.func.grad(loss, every)(*inputs)):
        torch.testing.assert_close(gradient, exact[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(per_sample[i], torch.stack((exact[i], exact_double[i])), rtol=1e-10, atol=1e-12)
    jacobian = torch.func.jacrev(function)(*inputs)
    pulled = torch.tensordot(2 * function(*inputs), jacobian, dims=function(*inputs).dim())
    torch.testing.assert_close(pulled, exact[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="'cpu' is not available: it has no rules for the transforms"):
        torch.func.grad(loss)(*inputs, backend="cpu")


def test_a_gradient_by_transform_compiles():
    torch._dynamo.reset()
    function, inputs = OPERATORS["mhca"]
    gradient = torch.func.grad(lambda *x: function(*x).square().sum(), (0, 3))
    for actual, expected in zip(torch.compile(gradient, fullgraph=True)(*inputs), gradient(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_of_a_module():
    """As the tutorials of torch.func compute them."""
    torch.manual_seed(0)
    module = MHCA(12, 3, (3, 4), rpe_drop=0.0, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    (images,) = normal((4, 13, 12))

    def loss(parameters, image):
        return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        module.zero_grad()
        module(image[None]).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_traced_saved_and_loaded(name, grad, tmp_path):
    """A trace knows the operators, with their derivatives, whether or not it was made with gradients on."""
    function, inputs = OPERATORS[name]

    class Call(torch.nn.Module):
        def forward(self, *x):
            return function(*x)

    examples = tuple(torch.ones_like(t).requires_grad_(grad) for t in inputs)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that become constants
        torch.jit.trace(Call(), examples).save(tmp_path / "call.pt")
    loaded = torch.jit.load(tmp_path / "call.pt")
    x, y = leaves(inputs), leaves(inputs)
    exact = torch.autograd.grad(function(*y, backend="reference").square().sum(), y)
    for actual, expected in zip(torch.autograd.grad(loaded(*x).square().sum(), x), exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_are_refused(name):
    """Wherever one would count; the first, with a graph of it, is the same."""
    function, inputs = OPERATORS[name]
    plain = leaves(inputs)
    expected = torch.autograd.grad(function(*plain, backend="cpu").square().sum(), plain)

    def penalty(x):
        value = function(*x, backend="cpu").square().sum()
        gradients = torch.autograd.grad(value, x, create_graph=True)
        for gradient, first in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, first)
        return value + sum(g.square().sum() for g in gradients)

    x = leaves(inputs)
    with pytest.raises(RuntimeError, match="the kernels have no second derivative; pass backend='reference'"):
        penalty(x).backward()
    for i in range(len(inputs)):
        x = leaves(inputs)
        with pytest.raises(RuntimeError, match="the kernels have no second derivative; pass backend='reference'"):
            torch.autograd.grad(penalty(x), x[i])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_checkpoint_that_ends_with_it(name, reentrant):
    """Its saved tensors are made again in its own backward."""
    function, inputs = OPERATORS[name]

    def region(*x):
        return function(*(t.sin() for t in x), backend="cpu")

    plain, again = leaves(inputs), leaves(inputs)
    expected = torch.autograd.grad(region(*plain).square().sum(), plain)
    checkpoint(region, *again, use_reentrant=reentrant).square().sum().backward()
    for leaf, gradient in zip(again, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


MODULES = {
    "mhca": (lambda: MHCA(12, 3, (3, 4)), 13),
    "head tokens": (lambda: HeadTokenAttention(12, 3), 13),
    "daff": (lambda: DAFF(12, grid_size=(3, 4)), 13),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_for_any_batch(name):
    """One graph, with symbolic sizes and numbers."""
    torch._dynamo.reset()
    build, count = MODULES[name]
    torch.manual_seed(0)
    module = build().eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        (x,) = normal((batch, count, 12), dtype=torch.float32)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_alignment_compiled_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(feature_alignment_loss, fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 3), (3, 5)):
        student, teacher = normal((batch, 2 * tokens, 7), (batch, tokens, 7))
        student.requires_grad_()
        (expected,) = torch.autograd.grad(feature_alignment_loss(student, teacher, backend="reference"), student)
        (gradient,) = torch.autograd.grad(compiled(student, teacher), student)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_exported_without_grad_the_alignment_trains():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return feature_alignment_loss(student, teacher)

    student, teacher = normal((2, 6, 7), (2, 3, 7))
    program = torch.export.export(Loss(), (student, teacher)).module()
    student.requires_grad_()
    (expected,) = torch.autograd.grad(feature_alignment_loss(student, teacher, backend="reference"), student)
    (gradient,) = torch.autograd.grad(program(student, teacher), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
