"""Distance of unit tokens, one sequence averaged to the length of the other, on a GPU (Bootstrapping ViTs, Eq. 6).

Floor: student and teacher read once forward; the gradient's direction written once, read once, spread out once.
"""

import torch

import triton
import triton.language as tl
from fastib import _gpu_limits as limits

from .attention_config import device_guard

NAME = "feature_alignment_loss"
SCALARS = ["L", "rows"]


@triton.jit
def _unit_tokens(
    x_ptr, stride_b, stride_n, row, live, c, L, eps, C: tl.constexpr, STEP: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Averaged, centred tokens (BLOCK_L, BLOCK_C) of length 1, and the factor (BLOCK_L,) that made them so."""
    b, first = row // L, (row % L) * STEP
    inside = live[:, None] & (c < C)[None, :]
    base = x_ptr + b * stride_b + first * stride_n
    x = tl.zeros((row.shape[0], c.shape[0]), tl.float32)
    for r in range(STEP):
        x += tl.load(base[:, None] + r * stride_n + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if STEP > 1:
        x = x * (1.0 / STEP)
    if CENTER:
        for _ in tl.static_range(2):  # once more for what the first mean's rounding left
            x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    # not the approximate quotient: between tokens that are alike, the rounding of two factors is the distance
    factor = tl.div_rn(1.0, tl.sqrt(tl.sum(x * x, 1) + C * eps))
    return x * factor[:, None], factor


@triton.jit(do_not_specialize=SCALARS)
def feature_alignment_fwd_kernel(
    student_ptr, teacher_ptr, loss_ptr, direction_ptr, factor_ptr, stride_sb, stride_sn, stride_tb, stride_tn,
    L, rows, eps, C: tl.constexpr, STUDENT_STEP: tl.constexpr, TEACHER_STEP: tl.constexpr, CENTER: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """loss (B, L) and, with GRADIENT, direction (B, L, C) and factor (B, L). Program: BLOCK_L compared tokens."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    live = row < rows
    c = tl.arange(0, BLOCK_C)
    u, factor = _unit_tokens(student_ptr, stride_sb, stride_sn, row, live, c, L, eps, C, STUDENT_STEP, CENTER)
    v, _ = _unit_tokens(teacher_ptr, stride_tb, stride_tn, row, live, c, L, eps, C, TEACHER_STEP, CENTER)
    difference = u - v
    tl.store(loss_ptr + row, tl.sum(difference * difference, 1), mask=live)
    if GRADIENT:
        along = tl.sum(difference * u, 1)
        direction = (difference - u * along[:, None]).to(direction_ptr.dtype.element_ty)
        tl.store(direction_ptr + row[:, None] * C + c[None, :], direction, mask=live[:, None] & (c < C)[None, :])
        tl.store(factor_ptr + row, 2.0 * factor, mask=live)


@triton.jit(do_not_specialize=SCALARS)
def feature_alignment_bwd_kernel(
    grad_ptr, direction_ptr, factor_ptr, out_ptr, stride_gb, stride_gl, L, rows, C: tl.constexpr, STEP: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (B, L STEP, C) dense. Program: BLOCK_L compared tokens, each spread over its STEP."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    live = row < rows
    c = tl.arange(0, BLOCK_C)
    inside = live[:, None] & (c < C)[None, :]
    grad = tl.load(grad_ptr + row // L * stride_gb + row % L * stride_gl, mask=live, other=0.0)
    scale = grad * tl.load(factor_ptr + row, mask=live, other=0.0) * (1.0 / STEP)
    direction = tl.load(direction_ptr + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    value = (direction * scale[:, None]).to(out_ptr.dtype.element_ty)
    for r in range(STEP):
        tl.store(out_ptr + (row[:, None] * STEP + r) * C + c[None, :], value, mask=inside)


def _blocks(channels: int) -> tuple[int, int, int]:
    """Tokens, channels and warps of a program: about 2048 elements, and a thread holds 16 of each tile, at most 32."""
    block_c = max(16, triton.next_power_of_2(channels))
    return max(1, 2048 // block_c), block_c, max(4, block_c // 1024)


def feature_alignment_fwd(student, teacher, center, eps, gradient):
    """loss (B, L), direction (B, L, C) and factor (B, L), the last two empty without `gradient`. As the native op."""
    limits.check(NAME, limits.feature_alignment(student))
    B, N, C = student.shape
    M = teacher.shape[1]
    L = min(N, M)
    kept = B if gradient else 0
    loss = student.new_empty((B, L), dtype=torch.float32)
    direction = torch.empty((kept, L, C), dtype=student.dtype, device=student.device)
    factor = student.new_empty((kept, L), dtype=torch.float32)
    if loss.numel() == 0:
        return loss, direction, factor
    student, teacher = (t if t.stride(2) == 1 or C == 1 else t.contiguous() for t in (student, teacher))
    block_l, block_c, warps = _blocks(C)
    with device_guard(student):
        feature_alignment_fwd_kernel[(triton.cdiv(B * L, block_l),)](
            student, teacher, loss, direction, factor, *student.stride()[:2], *teacher.stride()[:2],
            L, B * L, float(eps), C, N // L, M // L, bool(center), bool(gradient), block_l, block_c,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, direction, factor


def feature_alignment_bwd(grad, direction, factor, tokens):
    """Gradient (B, tokens, C) to the student. Arguments: the native op's."""
    limits.check(NAME, limits.feature_alignment(direction))
    B, L, C = direction.shape
    out = torch.empty((B, tokens, C), dtype=direction.dtype, device=direction.device)
    if out.numel() == 0:
        return out
    block_l, block_c, warps = _blocks(C)
    with device_guard(direction):
        feature_alignment_bwd_kernel[(triton.cdiv(B * L, block_l),)](
            grad, direction.contiguous(), factor.contiguous(), out, *grad.stride(), L, B * L, C, tokens // L,
            block_l, block_c, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
