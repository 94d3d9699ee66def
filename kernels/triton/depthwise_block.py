"""The middle of DHVT's feed-forward on a GPU (DHVT, Sec. 3.2): passes over tiles of places by channels of one image.

s and conv(s) are written once in each direction, and gone after it; what all passes share is the bytes they move. Sums
over the batch are those of chunks of an image, a few tiles each, added up in a fixed order: no atomics.
"""

import torch

import triton
import triton.language as tl
from fastib import _gpu_limits as limits

BLOCK_P, BLOCK_C, STEPS = 16, 64, 8  # a chunk has STEPS tiles of BLOCK_P places


@triton.jit
def _tile(P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Places (BLOCK_P,) of one image, channels (BLOCK_C,), offsets of the elements and which of them there are."""
    tiles = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place < P)[:, None] & (channel < C)[None, :]
    return image, place, channel, (image * P + place[:, None]) * C + channel[None, :], inside


@triton.jit
def _chunk(P, C, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A chunk: its image, its first place, how many places, channels (BLOCK_C,)."""
    chunks = tl.cdiv(P, STEPS * BLOCK_P)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * STEPS * BLOCK_P
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return image, first, tl.minimum(P - first, STEPS * BLOCK_P), channel


@triton.jit
def _tile_of(image, first, channel, P, C, BLOCK_P: tl.constexpr):
    """The tile of a chunk that begins at place `first`: as `_tile`."""
    place = first + tl.arange(0, BLOCK_P)
    return place, (image * P + place[:, None]) * C + channel[None, :], (place < P)[:, None] & (channel < C)[None, :]


@triton.jit
def _norm(norm_ptr, channel, C):
    """shift, inv, gamma and beta of a norm, rows of (4, C)."""
    there = channel < C
    shift = tl.load(norm_ptr + channel, mask=there, other=0.0)
    inv = tl.load(norm_ptr + C + channel, mask=there, other=0.0)
    gamma = tl.load(norm_ptr + 2 * C + channel, mask=there, other=0.0)
    beta = tl.load(norm_ptr + 3 * C + channel, mask=there, other=0.0)
    return shift[None, :], inv[None, :], gamma[None, :], beta[None, :]


@triton.jit
def _phi(u):
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _slope(u):
    return _phi(u) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)


@triton.jit
def _neighbour(ptr, image, place, channel, k: tl.constexpr, flip: tl.constexpr, grid_h, grid_w, C):
    """Elements one tap away from `place`, 0 outside of the grid."""
    down, right = (1 - k // 3, 1 - k % 3) if flip else (k // 3 - 1, k % 3 - 1)
    row, column = place // grid_w + down, place % grid_w + right
    there = (row >= 0) & (row < grid_h) & (column >= 0) & (column < grid_w) & (place < grid_h * grid_w)
    offset = (image * grid_h * grid_w + row * grid_w + column)[:, None] * C + channel[None, :]
    return tl.load(ptr + offset, mask=there[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def depthwise_block_act_kernel(x_ptr, norm_ptr, s_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """s = GELU(norm1(x))."""
    _, _, channel, at, inside = _tile(P, C, BLOCK_P, BLOCK_C)
    shift, inv, gamma, beta = _norm(norm_ptr, channel, C)
    u = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift) * inv * gamma + beta
    tl.store(s_ptr + at, (u * _phi(u)).to(s_ptr.dtype.element_ty), mask=inside)


@triton.jit
def depthwise_block_conv_kernel(
    s_ptr, weight_ptr, conv_ptr, partial_ptr, grid_h, grid_w, C, CONV: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """conv(s) without its bias where CONV, else s itself.

    Of each chunk the mean of its first tile, and the sums of what differs from it and of the squares of that, of which
    at most `STEPS` times the chunk's variance cancels.
    """
    P = grid_h * grid_w
    image, first, count, channel = _chunk(P, C, STEPS, BLOCK_P, BLOCK_C)
    base = tl.zeros((BLOCK_C,), tl.float32)
    sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        place, at, inside = _tile_of(image, first + start, channel, P, C, BLOCK_P)
        if CONV:
            y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for k in tl.static_range(9):
                tap = tl.load(weight_ptr + k * C + channel, mask=channel < C, other=0.0)
                y += tap[None, :] * _neighbour(s_ptr, image, place, channel, k, False, grid_h, grid_w, C)
            tl.store(conv_ptr + at, y.to(conv_ptr.dtype.element_ty), mask=inside)
            y = y.to(conv_ptr.dtype.element_ty).to(tl.float32)
        else:
            y = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if start == 0:
            base = tl.sum(tl.where(inside, y, 0.0), 0) / tl.minimum(count, BLOCK_P)
        off = tl.where(inside, y - base[None, :], 0.0)
        sum += off
        squares += off * off
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * C + channel
    tl.store(to, base, mask=channel < C)
    tl.store(to + C, tl.sum(sum, 0), mask=channel < C)
    tl.store(to + 2 * C, tl.sum(squares, 0), mask=channel < C)


@triton.jit
def depthwise_block_out_kernel(s_ptr, conv_ptr, norm_ptr, out_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = GELU(norm2(conv)) + s."""
    _, _, channel, at, inside = _tile(P, C, BLOCK_P, BLOCK_C)
    shift, inv, gamma, beta = _norm(norm_ptr, channel, C)
    u = (tl.load(conv_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift) * inv * gamma + beta
    y = u * _phi(u) + tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def depthwise_block_bwd_norm2_kernel(
    grad_ptr, conv_ptr, norm_ptr, partial_ptr, P, C, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums of d2 = grad GELU'(u2) and of d2 hat, of each chunk."""
    image, first, count, channel = _chunk(P, C, STEPS, BLOCK_P, BLOCK_C)
    shift, inv, gamma, beta = _norm(norm_ptr, channel, C)
    sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_hat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        _, at, inside = _tile_of(image, first + start, channel, P, C, BLOCK_P)
        hat = (tl.load(conv_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift) * inv
        d = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * _slope(hat * gamma + beta)
        sum += d
        sum_hat += d * hat
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(to, tl.sum(sum, 0), mask=channel < C)
    tl.store(to + C, tl.sum(sum_hat, 0), mask=channel < C)


@triton.jit
def depthwise_block_bwd_y_kernel(
    d_ptr, y_ptr, norm_ptr, means_ptr, grad_ptr, P, C, ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The gradient to what a norm was given, y, from d after its affine map; d is first times GELU'(u) where ACT."""
    _, _, channel, at, inside = _tile(P, C, BLOCK_P, BLOCK_C)
    shift, inv, gamma, beta = _norm(norm_ptr, channel, C)
    mean_d = tl.load(means_ptr + channel, mask=channel < C, other=0.0)[None, :]
    mean_d_hat = tl.load(means_ptr + C + channel, mask=channel < C, other=0.0)[None, :]
    hat = (tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift) * inv
    d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACT:
        d *= _slope(hat * gamma + beta)
    grad = gamma * inv * (d - mean_d - hat * mean_d_hat)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def depthwise_block_bwd_norm1_kernel(
    grad_ptr, grad_conv_ptr, s_ptr, x_ptr, norm_ptr, weight_ptr, d_ptr, partial_ptr, grid_h, grid_w, C,
    STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d1 = (grad + conv^T grad_conv) GELU'(u1); of each chunk its sums and those of the convolution's weight: 11."""
    P = grid_h * grid_w
    image, first, count, channel = _chunk(P, C, STEPS, BLOCK_P, BLOCK_C)
    shift, inv, gamma, beta = _norm(norm_ptr, channel, C)
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 11 * C + channel
    sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_hat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        place, at, inside = _tile_of(image, first + start, channel, P, C, BLOCK_P)
        d = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(9):
            tap = tl.load(weight_ptr + k * C + channel, mask=channel < C, other=0.0)
            d += tap[None, :] * _neighbour(grad_conv_ptr, image, place, channel, k, True, grid_h, grid_w, C)
        hat = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift) * inv
        d = tl.where(inside, d * _slope(hat * gamma + beta), 0.0)
        tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=inside)
        sum += d
        sum_hat += d * hat
    tl.store(to, tl.sum(sum, 0), mask=channel < C)
    tl.store(to + C, tl.sum(sum_hat, 0), mask=channel < C)
    for k in tl.static_range(0, 9, 3):  # a row of taps at a time: what they read is in the first cache
        left = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        middle = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        right = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, count, BLOCK_P):
            place, at, inside = _tile_of(image, first + start, channel, P, C, BLOCK_P)
            here = tl.load(grad_conv_ptr + at, mask=inside, other=0.0).to(tl.float32)
            left += here * _neighbour(s_ptr, image, place, channel, k, False, grid_h, grid_w, C)
            middle += here * _neighbour(s_ptr, image, place, channel, k + 1, False, grid_h, grid_w, C)
            right += here * _neighbour(s_ptr, image, place, channel, k + 2, False, grid_h, grid_w, C)
        tl.store(to + (2 + k) * C, tl.sum(left, 0), mask=channel < C)
        tl.store(to + (3 + k) * C, tl.sum(middle, 0), mask=channel < C)
        tl.store(to + (4 + k) * C, tl.sum(right, 0), mask=channel < C)


class _Passes:
    """The launches on x (B, P, C) dense, and what lies between them."""

    def __init__(self, x, parameters, grid_h, grid_w, eps1, eps2):
        limits.check("depthwise_block", limits.dtype(x))
        self.x, self.grid_size, self.eps = x.contiguous(), (grid_h, grid_w), (eps1, eps2)
        self.batch, self.places, self.channels = x.shape
        self.affine = (parameters[0], parameters[1]), (parameters[4], parameters[5])
        self.weight = parameters[2].reshape(self.channels, 9).t().contiguous()  # (9, C)
        self.bias = parameters[3]
        blocks, self.chunks = triton.cdiv(self.channels, BLOCK_C), triton.cdiv(self.places, STEPS * BLOCK_P)
        self.grid = self.batch * triton.cdiv(self.places, BLOCK_P), blocks
        self.chunk_grid = self.batch * self.chunks, blocks
        self.options = {"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C, "enable_fp_fusion": True}
        self.chunk_options = self.options | {"STEPS": STEPS, "num_warps": 8}

    def partial(self, rows):
        return self.x.new_empty((self.chunk_grid[0], rows, self.channels), dtype=torch.float32)

    def norm(self, place, mean, var):
        """(4, C) for the kernels: shift, inv, gamma, beta."""
        shift = -mean if place == 0 else self.bias - mean
        return torch.stack((shift, (var.double() + self.eps[place]).rsqrt().float(), *self.affine[place]))

    def moments(self, partial):
        """Mean and biased variance of what the chunks saw."""
        size = STEPS * BLOCK_P
        first = torch.arange(self.chunks, device=partial.device) * size
        count = (self.places - first).clamp(max=size).double().repeat(self.batch)[:, None]
        (base, sums, squares), total = partial.double().unbind(1), self.batch * self.places
        means = base + sums / count
        mean = (means * count).sum(0) / total
        var = (squares - sums**2 / count + count * (means - mean) ** 2).sum(0) / total
        return mean, var

    def activate(self, norm1):
        s = torch.empty_like(self.x)
        depthwise_block_act_kernel[self.grid](self.x, norm1, s, self.places, self.channels, **self.options)
        return s

    def convolve(self, s, conv=True):
        out, partial = torch.empty_like(self.x) if conv else s, self.partial(3)
        depthwise_block_conv_kernel[self.chunk_grid](
            s, self.weight, out, partial, *self.grid_size, self.channels, CONV=conv, **self.chunk_options
        )
        return out, partial


def depthwise_block_fwd(x, gamma1, beta1, weight, bias, gamma2, beta2, statistics, grid_h, grid_w, eps1, eps2):
    """out (B, P, C) and the statistics used (4, C)."""
    passes = _Passes(x, (gamma1, beta1, weight, bias, gamma2, beta2), grid_h, grid_w, eps1, eps2)
    out, used = torch.empty_like(passes.x), gamma1.new_empty((4, passes.channels))
    if statistics is not None:
        used.copy_(statistics)
    if x.numel() == 0:
        return out, used
    if statistics is None:
        used[0], used[1] = passes.moments(passes.convolve(passes.x, conv=False)[1])
    s = passes.activate(passes.norm(0, used[0], used[1]))
    conv, partial = passes.convolve(s)
    if statistics is None:
        mean, used[3] = passes.moments(partial)
        used[2] = mean + bias
    depthwise_block_out_kernel[passes.grid](
        s, conv, passes.norm(1, used[2], used[3]), out, passes.places, passes.channels, **passes.options
    )
    return out, used


def depthwise_block_bwd(
    grad_out, x, gamma1, beta1, weight, bias, gamma2, beta2, used, training, grid_h, grid_w, eps1, eps2
):
    """Gradients to x and the six parameters."""
    parameters = (gamma1, beta1, weight, bias, gamma2, beta2)
    passes = _Passes(x, parameters, grid_h, grid_w, eps1, eps2)
    if x.numel() == 0:
        return torch.zeros_like(passes.x), *(torch.zeros_like(p) for p in parameters)
    grad_out, sizes = grad_out.contiguous(), (passes.places, passes.channels)
    norm1, norm2 = passes.norm(0, used[0], used[1]), passes.norm(1, used[2], used[3])
    share = 1.0 / (passes.batch * passes.places) if training else 0.0
    s = passes.activate(norm1)
    conv, _ = passes.convolve(s)
    partial = passes.partial(2)
    depthwise_block_bwd_norm2_kernel[passes.chunk_grid](grad_out, conv, norm2, partial, *sizes, **passes.chunk_options)
    sums2 = partial.sum(0, dtype=torch.float64)
    means = (sums2 * share).float()
    depthwise_block_bwd_y_kernel[passes.grid](grad_out, conv, norm2, means, conv, *sizes, ACT=True, **passes.options)
    grad_x, partial = torch.empty_like(passes.x), passes.partial(11)
    depthwise_block_bwd_norm1_kernel[passes.chunk_grid](
        grad_out, conv, s, passes.x, norm1, passes.weight, grad_x, partial, *passes.grid_size, passes.channels,
        **passes.chunk_options,
    )  # fmt: skip
    sums1 = partial.sum(0, dtype=torch.float64)
    means = (sums1[:2] * share).float()
    depthwise_block_bwd_y_kernel[passes.grid](
        grad_x, passes.x, norm1, means, grad_x, *sizes, ACT=False, **passes.options
    )
    # In training the mean that norm2 takes away holds the bias.
    grad_bias = torch.zeros_like(bias) if training else (sums2[0] * gamma2 * norm2[1]).float()
    grad_weight = sums1[2:].t().float().reshape(weight.shape)
    return (grad_x, sums1[1].float(), sums1[0].float(), grad_weight, grad_bias, sums2[1].float(), sums2[0].float())
