"""Feature alignment (Bootstrapping ViTs, Eq. 6): the public function, its autograd and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastib import _gpu_limits as limits
from fastib.ops import _backend
from fastib.ops._arguments import check_device, check_dtype, check_finite, check_tensors, invalid, is_autocast_enabled
from fastib.ops._backend import Op, below_autograd
from fastib.reference.feature_alignment import feature_alignment_loss_ref

_NAME = "feature_alignment_loss"
SCHEMAS = {
    "feature_alignment": (
        "(Tensor student, Tensor teacher, bool center, float eps, bool gradient) -> "
        "(Tensor loss, Tensor direction, Tensor factor)"
    ),
    "feature_alignment_backward": "(Tensor grad, Tensor direction, Tensor factor, int tokens) -> Tensor",
}


def feature_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    center: bool = True,
    eps: float = 1e-5,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance of a student's tokens from a teacher's, their lengths and means left out (Bootstrapping ViTs, Eq. 6).

    The longer sequence is averaged along its tokens to the length of the shorter; each token is centred over its
    channels and brought to length 1; `loss = reduction of |student - teacher|^2`. That is `mse_loss` of two
    `layer_norm`s without weights.

    student: (B, N, C). teacher: (B, M, C), a constant; the shorter length divides the longer. Same dtype: float32,
        bfloat16, float16 or float64; any strides, dense channels are read in place. Not cast under autocast, except
        that two dtypes are brought to the wider one.
    center: whether the mean over C is taken off each token.
    eps: added to the mean square over C, as `layer_norm` does.
    reduction: "mean" or "sum" over the (B, min(N, M)) tokens, or "none".
    backend: None chooses; "reference", "cpu" or "triton" insist.

    Returns a scalar, or (B, min(N, M)), in float32 (float64). Differentiable once, in student; "reference" any number
    of times. For the gradient one tensor of (B, min(N, M), C) is kept, and neither input.

    Raises ValueError for a wrong shape, dtype or range or a teacher that requires grad, RuntimeError for a device or
    backend that does not fit.
    """
    check_tensors(_NAME, student=student, teacher=teacher)
    if student.dtype != teacher.dtype and is_autocast_enabled(student):
        wide = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(wide), teacher.to(wide)
    _check(student, teacher)
    if reduction not in ("mean", "sum", "none"):
        raise invalid(_NAME, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    check_finite(_NAME, "eps", eps)
    if eps < 0:
        raise invalid(_NAME, "eps", "not negative", eps)
    if _OP.choose(backend, student) == "reference":
        return feature_alignment_loss_ref(student, teacher, center=center, eps=eps, reduction=reduction)
    # a recorded program may train where the call does not
    trains = (torch.is_grad_enabled() and student.requires_grad) or _backend.may_train_later()
    args = (student, teacher, bool(center), float(eps), trains)
    if _backend.is_recorded():
        loss = _forward(*args)[0]
    elif trains:
        loss = _FeatureAlignment.apply(_backend.tie(student), *args)
    else:
        with below_autograd():
            loss = _forward(*args)[0]
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 3:
        raise invalid(_NAME, "student", "of shape (B, N, C)", tuple(student.shape))
    batch, tokens, channels = student.shape
    if teacher.dim() != 3 or teacher.shape[0] != batch or teacher.shape[2] != channels:
        raise invalid(_NAME, "teacher", f"of shape ({batch}, M, {channels})", tuple(teacher.shape))
    short, long = min(tokens, teacher.shape[1]), max(tokens, teacher.shape[1])
    if long % short if short else long:
        expected = f"of a length that divides the student's {tokens} tokens, or is a multiple of it"
        raise invalid(_NAME, "teacher", expected, teacher.shape[1])
    check_dtype(_NAME, "student", student)
    if teacher.dtype != student.dtype:
        raise invalid(_NAME, "teacher", f"{student.dtype} like student", teacher.dtype)
    if teacher.requires_grad:
        raise invalid(_NAME, "teacher", "a constant", "a tensor that requires grad")
    check_device(_NAME, "teacher", teacher, student.device)


def _forward_fake(student: Tensor, teacher: Tensor, center: bool, eps: float, gradient: bool) -> tuple[Tensor, ...]:
    batch, tokens, channels = student.shape[0], min(student.shape[1], teacher.shape[1]), student.shape[2]
    kept, sums = batch if gradient else 0, torch.promote_types(student.dtype, torch.float32)
    return (
        student.new_empty((batch, tokens), dtype=sums),
        student.new_empty((kept, tokens, channels)),
        student.new_empty((kept, tokens), dtype=sums),
    )


def _backward_fake(grad: Tensor, direction: Tensor, factor: Tensor, tokens: int) -> Tensor:
    return direction.new_empty((direction.shape[0], tokens, direction.shape[2]))


_forward = _backend.register(
    "feature_alignment", SCHEMAS["feature_alignment"], _forward_fake, "feature_alignment.feature_alignment_fwd"
)
_backward = _backend.register_backward(
    _NAME,
    "feature_alignment_backward",
    SCHEMAS["feature_alignment_backward"],
    _backward_fake,
    "feature_alignment.feature_alignment_bwd",
)
_OP = Op(_NAME, gpu="triton", kernel="feature_alignment", gpu_limits=limits.feature_alignment)


class _FeatureAlignment(torch.autograd.Function):
    """The eager path; the dispatcher's own autograd serves compile and export."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, *args: Any) -> Tensor:
        with below_autograd():
            loss, *kept = _forward(*args)
        ctx.tokens = args[0].shape[1]
        ctx.save_for_backward(tie, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tie, *kept = ctx.saved_tensors
        with torch.no_grad():
            gradient = _backward(grad, *kept, ctx.tokens)
        return (None, *_backend.once(_NAME, tie, gradient), None, None, None, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.tokens = inputs[0].shape[1]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.tokens), None, None, None, None


torch.library.register_autograd("fastib::feature_alignment", _gradient, setup_context=_save, lib=_backend.LIBRARY)
