"""Loss of linearly combined attention maps against teacher maps on a GPU (AAL, Eq. 4-5).

    a = w attn + bias,  loss_bc = sum_s (a / |a| - t / |t|)^2

Every kernel makes the tiles of a that it needs: a is never in memory. The forward leaves three numbers a map, from
which the gradient to a tile of a follows: its factor 1 / |a|, the teacher's, and the part of the difference along a.
Where links are left out, a block of channels works on the maps between its first and its last link alone.
Floor per image: C S teacher elements read, 2 C M S operations forward, 4 more with gradients.
"""

import torch

import triton
import triton.language as tl
from fastib import _gpu_limits as limits

from .attention_config import device_guard
from .attention_tile import PRECISION

SCALARS = ["B", "C", "M", "S", "per_chunk"]
WARPS = 8
MAX_IMAGES = 65535  # of a launch: a grid's second and third dimension end there
D_UNIT = tl.constexpr(4096.0)  # what directions, at most 2, and weights, below 2, are multiplied by in float16
W_UNIT = tl.constexpr(16384.0)


def _tile(attn: torch.Tensor) -> tuple[int, int, int]:
    """Channels, maps and positions of a tile: the largest without spills on every chip."""
    return (32, 16, 32) if attn.element_size() == 4 else (32, 32, 64)


@triton.jit
def _linked(linked_ptr, block, M):
    """First (a whole tile) and end of the maps that a block of channels is linked to."""
    if linked_ptr is not None:
        first = tl.load(linked_ptr + 2 * block)
        end = tl.load(linked_ptr + 2 * block + 1)
    else:
        first = 0
        end = M
    return first, end


@triton.jit
def _maps(
    w_ptr, bias_ptr, attn_ptr, stride_am, c, s, first, end, C, M, S, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The tile (c, s) of a, 0 outside, whose links are to the maps from first to end. w: (C, M) dense."""
    c = tl.minimum(c, C - 1)
    bias = tl.load(bias_ptr + c).to(tl.float32)
    a = tl.zeros((BLOCK_C, BLOCK_S), tl.float32) + bias[:, None]
    for start in range(first, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        w = tl.load(w_ptr + c[:, None] * M + m[None, :], mask=(m < M)[None, :], other=0.0)
        attn = tl.load(
            attn_ptr + m[:, None] * stride_am + s[None, :], mask=(m < M)[:, None] & (s < S)[None, :], other=0.0
        )
        a = tl.dot(w, attn, a, input_precision=PRECISION)
    return tl.where((s < S)[None, :], a, 0.0)


@triton.jit
def _teacher(target_ptr, stride_tc, c, s, C, S):
    row = tl.minimum(c, C - 1)[:, None].to(tl.int64)
    return tl.load(target_ptr + row * stride_tc + s[None, :], mask=(s < S)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _statistics(stats_ptr, scale_ptr, bc, c, C):
    """1 / |a|, 1 / |t|, the difference along a, and the factor of the map's gradient. (BLOCK_C,) each."""
    live = c < C
    a_factor = tl.load(stats_ptr + 3 * (bc + c), mask=live, other=0.0)
    t_factor = tl.load(stats_ptr + 3 * (bc + c) + 1, mask=live, other=0.0)
    along = tl.load(stats_ptr + 3 * (bc + c) + 2, mask=live, other=0.0)
    factor = 2.0 * a_factor
    if scale_ptr is not None:
        factor = factor * tl.load(scale_ptr + bc + c, mask=live, other=0.0)
    return a_factor, t_factor, along, factor


@triton.jit
def _direction(a, t, a_factor, t_factor, along):
    """Gradient of the scaled loss to a tile of a, without its factor: at most 2."""
    unit = a * a_factor[:, None]
    return unit - t * t_factor[:, None] - unit * along[:, None]


@triton.jit
def _power_of_two(x):
    """The largest power of two that is not above |x|; 1 for 0, infinity for NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(bits == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SCALARS)
def attention_link_fwd_kernel(
    attn_ptr, w_ptr, bias_ptr, linked_ptr, target_ptr, loss_ptr, stats_ptr, stride_ab, stride_am, stride_tb, stride_tc,
    C, M, S, eps, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """loss (B, C) and stats (B, C, 3). Program: an image and BLOCK_C channels."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    attn_ptr += b * stride_ab
    target_ptr += b * stride_tb
    first, end = _linked(linked_ptr, tl.program_id(0), M)
    lane = tl.arange(0, BLOCK_S)
    aa = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    tt = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for start in range(0, S, BLOCK_S):
        a = _maps(w_ptr, bias_ptr, attn_ptr, stride_am, c, start + lane, first, end, C, M, S, BLOCK_C, BLOCK_M, BLOCK_S)
        t = _teacher(target_ptr, stride_tc, c, start + lane, C, S)
        aa += a * a
        tt += t * t
    a_norm = tl.sqrt_rn(tl.sum(aa, 1))
    a_factor = tl.div_rn(1.0, tl.where(a_norm < eps, eps, a_norm))
    t_norm = tl.sqrt_rn(tl.sum(tt, 1))
    t_factor = tl.div_rn(1.0, tl.where(t_norm < eps, eps, t_norm))
    loss = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    along = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for start in range(0, S, BLOCK_S):
        a = _maps(w_ptr, bias_ptr, attn_ptr, stride_am, c, start + lane, first, end, C, M, S, BLOCK_C, BLOCK_M, BLOCK_S)
        t = _teacher(target_ptr, stride_tc, c, start + lane, C, S)
        unit = a * a_factor[:, None]
        d = unit - t * t_factor[:, None]
        loss += d * d
        along += d * unit
    along = tl.where(a_norm > eps, tl.sum(along, 1), 0.0)  # the length of a does not count
    at = b * C + c
    tl.store(loss_ptr + at, tl.sum(loss, 1), mask=c < C)
    tl.store(stats_ptr + 3 * at, a_factor, mask=c < C)
    tl.store(stats_ptr + 3 * at + 1, t_factor, mask=c < C)
    tl.store(stats_ptr + 3 * at + 2, along, mask=c < C)


@triton.jit(do_not_specialize=SCALARS)
def attention_link_bwd_attn_kernel(
    attn_ptr, w_ptr, bias_ptr, linked_ptr, target_ptr, stats_ptr, scale_ptr, dattn_ptr, stride_ab, stride_am,
    stride_tb, stride_tc, C, M, S, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dattn (B, M, S) dense. Program: an image, BLOCK_M maps and BLOCK_S positions; it walks along the channels."""
    b = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    attn_ptr += b * stride_ab
    target_ptr += b * stride_tb
    grad = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for block in range(0, tl.cdiv(C, BLOCK_C)):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        first, end = _linked(linked_ptr, block, M)
        meets = True
        if linked_ptr is not None:
            meets = (first < (tl.program_id(1) + 1) * BLOCK_M) & (end > tl.program_id(1) * BLOCK_M)
        if meets:
            a = _maps(w_ptr, bias_ptr, attn_ptr, stride_am, c, s, first, end, C, M, S, BLOCK_C, BLOCK_M, BLOCK_S)
            t = _teacher(target_ptr, stride_tc, c, s, C, S)
            a_factor, t_factor, along, factor = _statistics(stats_ptr, scale_ptr, b * C, c, C)
            d = _direction(a, t, a_factor, t_factor, along)
            w = tl.load(w_ptr + c[:, None] * M + m[None, :], mask=(c < C)[:, None] & (m < M)[None, :], other=0.0)
            if w.dtype == tl.float16:
                # Its range holds no factor: powers of two move to w, and from the columns of w to the sums.
                power = _power_of_two(factor)
                w = w.to(tl.float32) * power[:, None]
                column = _power_of_two(tl.max(tl.abs(w), 0))
                w = (w * (1.0 / column)[None, :] * W_UNIT).to(tl.float16)
                d = (d * (factor / power * D_UNIT)[:, None]).to(tl.float16)
                part = tl.dot(tl.trans(w), d, input_precision=PRECISION)
                grad += part * (column / (W_UNIT * D_UNIT))[:, None]
            else:
                d = (d * factor[:, None]).to(w.dtype)
                grad = tl.dot(tl.trans(w), d, grad, input_precision=PRECISION)
    inside = (m < M)[:, None] & (s < S)[None, :]
    tl.store(dattn_ptr + (b * M + m[:, None]) * S + s[None, :], grad.to(dattn_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def attention_link_bwd_weight_kernel(
    attn_ptr, w_ptr, bias_ptr, linked_ptr, target_ptr, stats_ptr, scale_ptr, dw_ptr, dbias_ptr, stride_ab, stride_am,
    stride_tb, stride_tc, B, C, M, S, per_chunk, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Parts (chunks, C, M) of dw and (chunks, C) of dbias. Program: BLOCK_C channels, BLOCK_M maps, a run of images."""
    chunk = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_S)
    grad = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    first, end = _linked(linked_ptr, tl.program_id(0), M)
    last_image = tl.minimum((chunk + 1) * per_chunk, B)
    if linked_ptr is not None:  # no link to any of these maps: their gradient is 0; the first program sums the bias's
        column = tl.program_id(1) * BLOCK_M
        meets = ((first < column + BLOCK_M) & (end > column)) | (column == 0)
        last_image = tl.where(meets, last_image, 0)
    for b in range(chunk * per_chunk, last_image):
        a_factor, t_factor, along, factor = _statistics(stats_ptr, scale_ptr, b * C, c, C)
        image_grad = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
        for start in range(0, S, BLOCK_S):
            s = start + lane
            maps_ptr = attn_ptr + b * stride_ab
            a = _maps(w_ptr, bias_ptr, maps_ptr, stride_am, c, s, first, end, C, M, S, BLOCK_C, BLOCK_M, BLOCK_S)
            t = _teacher(target_ptr + b * stride_tb, stride_tc, c, s, C, S)
            d = _direction(a, t, a_factor, t_factor, along)
            inside = (m < M)[:, None] & (s < S)[None, :]
            attn = tl.load(maps_ptr + m[:, None] * stride_am + s[None, :], mask=inside, other=0.0)
            rounded = (d * D_UNIT).to(attn.dtype)
            image_grad = tl.dot(rounded, tl.trans(attn), image_grad, input_precision=PRECISION)
            total += d * factor[:, None]
        grad += image_grad * (factor / D_UNIT)[:, None]
    row = chunk * C + c
    tl.store(dw_ptr + row[:, None] * M + m[None, :], grad, mask=(c < C)[:, None] & (m < M)[None, :])
    if tl.program_id(1) == 0:
        tl.store(dbias_ptr + row, tl.sum(total, 1), mask=c < C)


def _prepare(attn, weight, target, mask):
    """attn and target with dense rows, and the weight as it is multiplied: masked and in attn's dtype."""
    limits.check("attention_link_loss", limits.dtype(attn))
    weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
    attn, target = (t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in (attn, target))
    if attn.stride(1) * attn.shape[1] >= 1 << 31:  # 32 bits do not reach across an image
        attn = attn.contiguous()
    return attn, weight.to(attn.dtype).contiguous(), target


def _links(attn, mask):
    """For each block of channels the first, a whole tile, and the end of the maps that it is linked to: (blocks, 2)."""
    if mask is None or mask.numel() == 0:
        return None
    tile = _tile(attn)
    channels, maps = mask.shape
    blocks = triton.cdiv(channels, tile[0])
    rows = torch.nn.functional.pad(mask, (0, 0, 0, blocks * tile[0] - channels)).view(blocks, tile[0], maps).any(1)
    at = torch.arange(maps, device=mask.device, dtype=torch.int32)
    first = torch.where(rows, at, maps).amin(1) // tile[1] * tile[1]
    return torch.stack([first, torch.where(rows, at + 1, 0).amax(1)], 1).to(torch.int32)


def _runs(images):
    return [slice(first, first + MAX_IMAGES) for first in range(0, images, MAX_IMAGES)]


def _forward(attn, weight, bias, target, linked, eps):
    """loss (B, C) and the statistics of each map, for the gradients."""
    B, M, S = attn.shape
    C = weight.shape[0]
    loss = attn.new_empty((B, C), dtype=torch.float32)
    stats = attn.new_empty((B, C, 3), dtype=torch.float32)
    if loss.numel() == 0 or S == 0:
        return loss.zero_(), stats.zero_()
    tile = _tile(attn)
    with device_guard(attn):
        for some in _runs(B):
            attention_link_fwd_kernel[(triton.cdiv(C, tile[0]), len(attn[some]))](
                attn[some], weight, bias.contiguous(), linked, target[some], loss[some], stats[some],
                *attn.stride()[:2], *target.stride()[:2], C, M, S, float(eps), *tile,
                num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return loss, stats


def _gradients(attn, weight, bias, target, linked, stats, scale):
    """Gradients of sum(scale * loss) to attn, weight and bias; scale (B, C), or None for 1."""
    B, M, S = attn.shape
    C = weight.shape[0]
    dattn = torch.empty((B, M, S), dtype=attn.dtype, device=attn.device)
    room = B * S * attn.element_size() // (64 * max(M, 1))  # for parts, below a sixteenth of the target
    chunks = max(1, min(B, MAX_IMAGES, room))
    per_chunk = -(-B // chunks)
    dweight = attn.new_empty((chunks, C, M), dtype=torch.float32)
    dbias = attn.new_empty((chunks, C), dtype=torch.float32)
    bias = bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    tile = _tile(attn)
    blocks = [triton.cdiv(n, block) for n, block in zip((C, M, S), tile, strict=True)]
    strides = *attn.stride()[:2], *target.stride()[:2]
    with device_guard(attn):
        for some in _runs(B if M > 0 else 0):
            attention_link_bwd_attn_kernel[(blocks[2], blocks[1], len(attn[some]))](
                attn[some], weight, bias, linked, target[some], stats[some],
                None if scale is None else scale[some], dattn[some], *strides,
                C, M, S, *tile, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        attention_link_bwd_weight_kernel[(blocks[0], max(blocks[1], 1), chunks)](  # of no maps, too, the bias's
            attn, weight, bias, linked, target, stats, scale, dweight, dbias, *strides,
            B, C, M, S, per_chunk, *tile, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dattn, dweight.sum(0), dbias.sum(0)


def attention_link_fwd(attn, weight, bias, target, mask, eps):
    """loss (B, C) float32. Arguments: the native op's. RuntimeError for a dtype not taken."""
    attn, weight, target = _prepare(attn, weight, target, mask)
    return _forward(attn, weight, bias, target, _links(attn, mask), eps)[0]


def attention_link_bwd(grad, attn, weight, bias, target, mask, eps):
    """Gradients to attn, weight and bias, given that of the (B, C) sums. Arguments: the native op's."""
    return _both(attn, weight, bias, target, mask, eps, grad)[1:]


def attention_link_both(attn, weight, bias, target, mask, eps):
    """The (B, C) sums, and the gradients of their sum. Arguments: the native op's."""
    return _both(attn, weight, bias, target, mask, eps, None)


def _both(attn, weight, bias, target, mask, eps, scale):
    if target.numel() == 0:
        loss = attn.new_zeros((attn.shape[0], weight.shape[0]), dtype=torch.float32)
        return loss, attn.new_zeros(attn.shape), torch.zeros_like(weight), torch.zeros_like(bias)
    attn, weight, target = _prepare(attn, weight, target, mask)
    linked = _links(attn, mask)
    loss, stats = _forward(attn, weight, bias, target, linked, eps)
    dattn, dweight, dbias = _gradients(attn, weight, bias, target, linked, stats, scale)
    return loss, dattn, dweight if mask is None else dweight.masked_fill_(~mask, 0.0), dbias
