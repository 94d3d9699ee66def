"""The middle of DHVT's feed-forward (DHVT, Sec. 3.2): the public function, its autograd and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastib.ops import _backend
from fastib.ops._arguments import (
    autocast,
    check_device,
    check_dtype,
    check_finite,
    check_optional,
    check_tensors,
    grid,
    invalid,
)
from fastib.ops._backend import Op, below_autograd
from fastib.reference.depthwise_block import depthwise_block_ref

_NAME = "depthwise_block"
_TENSORS = "Tensor x, Tensor gamma1, Tensor beta1, Tensor weight, Tensor bias, Tensor gamma2, Tensor beta2"
_OPTIONS = "int grid_h, int grid_w, float eps1, float eps2"
SCHEMAS = {
    "depthwise_block": f"({_TENSORS}, Tensor? statistics, {_OPTIONS}) -> (Tensor out, Tensor used)",
    "depthwise_block_backward": (
        f"(Tensor grad_out, {_TENSORS}, Tensor used, bool training, {_OPTIONS})"
        " -> (Tensor grad_x, Tensor grad_gamma1, Tensor grad_beta1, Tensor grad_weight, Tensor grad_bias,"
        " Tensor grad_gamma2, Tensor grad_beta2)"
    ),
}


def depthwise_block(
    x: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    grid_size: int | tuple[int, int],
    *,
    statistics: Tensor | None = None,
    eps: tuple[float, float] = (1e-5, 1e-5),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """BatchNorm, GELU, depth-wise 3 x 3 convolution, BatchNorm, GELU, and a shortcut around the last three.

    `s = GELU(norm1(x)); out = GELU(norm2(conv(s))) + s`, `norm(y) = (y - mean) / sqrt(var + eps) gamma + beta`, per
    channel: DAFF between its two 1 x 1 convolutions (DHVT, Fig. 2). Neither s nor conv(s) is kept for the backward.

    x: (B, P, C), the places of the grid row-major: float32, bfloat16, float16 or float64; under autocast it is cast.
    gamma1, beta1, gamma2, beta2, bias: (C,). weight: (C, 1, 3, 3). Any floating dtype; computed in float32 (float64
        where x is).
    grid_size: (grid_h, grid_w) with P = grid_h * grid_w, or one int for a square grid.
    statistics: (4, C), the means and variances mean1, var1, mean2, var2 as constants, for evaluation. None: those over
        batch and places, through which the gradient flows; the variances are biased.
    eps: of norm1 and norm2.
    backend: None chooses; "reference", "cpu" or "triton" insist.

    Returns out (B, P, C) in x's dtype, and the statistics used (4, C), float32 (float64 for float64), without gradient.
    Raises ValueError for shapes, dtypes and numbers that do not fit, and for an x without elements whose statistics are
    asked for, RuntimeError for devices that differ and a backend that is not available; both name the argument.
    """
    check_tensors(_NAME, x=x, gamma1=gamma1, beta1=beta1, weight=weight, bias=bias, gamma2=gamma2, beta2=beta2)
    check_optional(_NAME, statistics=statistics)
    (x,) = autocast(x)
    grid_h, grid_w = grid(_NAME, grid_size)
    _check_tensors(x, gamma1, beta1, weight, bias, gamma2, beta2, statistics, grid_h * grid_w)
    if not isinstance(eps, tuple) or len(eps) != 2:
        raise invalid(_NAME, "eps", "a pair of numbers", repr(eps))
    for value in eps:
        check_finite(_NAME, "eps", value)
        if value < 0:
            raise invalid(_NAME, "eps", "0 or more", value)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameters = [t if t.dtype == wide else t.to(wide) for t in (gamma1, beta1, weight, bias, gamma2, beta2)]
    if statistics is not None:
        statistics = statistics.detach().to(wide)
    if _OP.choose(backend, x) == "reference":
        return depthwise_block_ref(x, *parameters, (grid_h, grid_w), statistics=statistics, eps=eps)
    args = (x, *parameters, statistics, grid_h, grid_w, *eps)
    if _backend.is_recorded():
        return _forward(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return _DepthwiseBlock.apply(*args)
    with below_autograd():
        return _forward(*args)


def _check_tensors(
    x: Tensor, gamma1: Tensor, beta1: Tensor, weight: Tensor, bias: Tensor, gamma2: Tensor, beta2: Tensor,
    statistics: Tensor | None, places: int,
) -> None:  # fmt: skip
    if x.dim() != 3:
        raise invalid(_NAME, "x", "of shape (B, P, C)", tuple(x.shape))
    check_dtype(_NAME, "x", x)
    if x.shape[1] != places:
        raise invalid(_NAME, "x", f"of P={places} places, those of grid_size", f"P={x.shape[1]}")
    channels = x.shape[2]
    shapes = {"gamma1": (gamma1, (channels,)), "beta1": (beta1, (channels,)), "weight": (weight, (channels, 1, 3, 3)),
              "bias": (bias, (channels,)), "gamma2": (gamma2, (channels,)), "beta2": (beta2, (channels,))}  # fmt: skip
    if statistics is not None:
        shapes["statistics"] = (statistics, (4, channels))
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise invalid(_NAME, name, f"of shape {shape}, as x is {tuple(x.shape)}", tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise invalid(_NAME, name, "floating point", tensor.dtype)
        check_device(_NAME, name, tensor, x.device)
    if statistics is None and x.shape[0] * places == 0:
        raise invalid(_NAME, "x", "of at least one image and place where its statistics are asked for", tuple(x.shape))


def _forward_fake(x: Tensor, gamma1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gamma1.new_empty((4, x.shape[2]))


def _backward_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gamma1, beta1, weight, bias, gamma2, beta2 = rest[:6]
    return x.new_empty(x.shape), *(t.new_empty(t.shape) for t in (gamma1, beta1, weight, bias, gamma2, beta2))


_forward = _backend.register(_NAME, SCHEMAS[_NAME], _forward_fake, "depthwise_block.depthwise_block_fwd")
_backward = _backend.register_backward(_NAME,
    "depthwise_block_backward", SCHEMAS["depthwise_block_backward"], _backward_fake,
    "depthwise_block.depthwise_block_bwd",
)  # fmt: skip
_OP = Op(_NAME, gpu="triton")


class _DepthwiseBlock(torch.autograd.Function):
    """The eager path: a third of the host time of the dispatcher's own autograd, which serves compile and export."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, used = _forward(*args)
        _save(ctx, args, (out, used))
        ctx.mark_non_differentiable(used)
        return out, used

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_used: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, statistics, grid_h, grid_w, eps1, eps2 = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (statistics is None, grid_h, grid_w, eps1, eps2)
    ctx.set_materialize_grads(False)


def _save_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    return (*_backward(grad_out, *ctx.saved_tensors, *ctx.options), *(None,) * 5)


torch.library.register_autograd(f"fastib::{_NAME}", _gradients, setup_context=_save_registered, lib=_backend.LIBRARY)
