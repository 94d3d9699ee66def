"""What the operators say of arguments that are no tensors."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastib import ops
from fastib.ops._arguments import autocast

N, X = (2, 3, 10, 8), (2, 4, 5, 6)
INPUTS = {
    "mhca_attention": {"q": N, "k": N, "v": N, "alpha": (3,), "center": (3, 2)},
    "head_token_attention": dict.fromkeys(("q", "k", "v", "q_extra", "k_extra", "v_extra"), N),
    "cls_attention_maps": {"q": (2, 3, 8), "k": N},
    "attention_link_loss": {"attn": (2, 4, 9), "weight": (5, 4), "bias": (5,), "target": (2, 5, 9), "mask": None},
    "augment_attention": {"attn": (2, 4, 9), "weight": (5, 4), "bias": (5,), "mask": None},
    "feature_alignment_loss": {"student": (2, 6, 7), "teacher": (2, 3, 7)},
    "involution": {"x": X, "weight": (2, 2, 3, 3, 5, 6)},
    "generalized_conv": {"x": X, "w_v": (9, 4), "w_o": (3, 9), "bias": None},
    "depthwise_block": {
        "x": (2, 9, 4), "gamma1": (4,), "beta1": (4,), "weight": (4, 1, 3, 3), "bias": (4,), "gamma2": (4,),
        "beta2": (4,), "statistics": None,
    },
}  # fmt: skip
OTHERS = {"mhca_attention": {"grid_size": 3}, "generalized_conv": {"num_heads": 9}, "depthwise_block": {"grid_size": 3}}


def test_every_operator_is_here():
    functions = {name for name in ops.__all__ if inspect.signature(getattr(ops, name)).parameters}
    assert functions == set(INPUTS)


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize(("op", "argument"), [(op, argument) for op in INPUTS for argument in INPUTS[op]])
def test_an_argument_that_is_no_tensor_is_named(op, argument, casts):
    shapes = INPUTS[op]
    inputs = {name: None if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    optional = shapes[argument] is None
    values = [[[1.0]], torch.zeros(shapes[argument] or 3).numpy()] + ([] if optional else [None])
    for value in values:
        expected = f"{argument} must be {'None or ' if optional else ''}a tensor, got {type(value).__name__}"
        with torch.autocast("cpu", torch.bfloat16, enabled=casts), pytest.raises(ValueError, match=expected):
            getattr(ops, op)(**{**inputs, argument: value}, **OTHERS.get(op, {}))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_autocast_of_every_device(device):
    """An image in half precision, as it comes from a layer, and weights that are not."""
    enabled, before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        torch.set_autocast_dtype(device, torch.float16)
        torch.set_autocast_enabled(device, True)
        with FakeTensorMode():
            x, weight = torch.empty(X, device=device, dtype=torch.float16), torch.empty(4, 4, device=device)
            cast = autocast(x, weight, None, torch.empty(3, device=device, dtype=torch.int64))
            assert [t if t is None else t.dtype for t in cast] == [torch.float16, torch.float16, None, torch.int64]
    finally:
        torch.set_autocast_dtype(device, before)
        torch.set_autocast_enabled(device, enabled)


def test_autocast_of_nothing_but_shapes():
    student, teacher = torch.empty(2, 6, 7, device="meta"), torch.empty(2, 3, 7, device="meta").half()
    with pytest.raises(ValueError, match=r"teacher must be torch\.float32 like student, got torch\.float16"):
        ops.feature_alignment_loss(student, teacher)
