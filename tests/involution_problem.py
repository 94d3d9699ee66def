"""One call of involution as a test sees it: inputs, the exact answer, and what rounding alone may cost."""

import torch
from helpers import Target, assert_twofold, expanded, on_device, sliced, transposed_rows, value_and_grads

from fastib.ops import involution
from fastib.reference import involution_ref

NAMES = ("out", "grad_x", "grad_weight")


def channels_last(t):
    """The same values with channels, or the group's taps, innermost."""
    order, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if t.dim() == 4 else ((0, 4, 5, 1, 2, 3), (0, 3, 4, 5, 1, 2))
    return t.permute(order).contiguous().permute(back)


def every_second(t):
    """The same values, every second element of each dimension of a larger tensor full of NaN."""
    big = t.new_full([2 * s for s in t.shape], torch.nan)
    return big[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


LAYOUTS = {
    "contiguous": lambda *t: t,
    "channels_last": lambda *t: tuple(map(channels_last, t)),
    "x_channels_last": lambda x, w, g: (channels_last(x), w, g),
    "weight_channels_last": lambda x, w, g: (x, channels_last(w), g),
    "grad_channels_last": lambda x, w, g: (x, w, channels_last(g)),
    "grad_contiguous": lambda x, w, g: (channels_last(x), channels_last(w), g),
    "sliced": lambda *t: tuple(map(sliced, t)),
    "sliced_channels_last": lambda *t: tuple(channels_last(sliced(channels_last(u))) for u in t),
    "rows_not_dense": lambda *t: tuple(map(transposed_rows, t)),
    "every_second": lambda *t: tuple(map(every_second, t)),
    "expanded": lambda *t: tuple(map(expanded, t)),
    "one_number": lambda *t: tuple(u[(slice(1),) * u.dim()].expand(u.shape) for u in t),
    "grad_one_number": lambda x, w, g: (x, w, g[:1, :1, :1, :1].expand(g.shape)),
}


class Problem:
    """Inputs of one call, the same on every device, and its exact answer."""

    def __init__(self, batch, channels, groups, kernel, size, dtype, *, stride=1, dilation=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        out_size = [-(-s // stride) for s in size]
        shapes = ((batch, channels, *size), (batch, groups, kernel, kernel, *out_size), (batch, channels, *out_size))
        x, weight, self.grad_out = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
        self.inputs, self.dtype = [x, weight], dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.options = {"stride": stride, "dilation": dilation}

    def call(self, function, inputs=None, grad_out=None, **options):
        grad_out = self.grad_out if grad_out is None else grad_out
        return value_and_grads(lambda *t: function(*t, **self.options, **options), inputs or self.inputs, grad_out)

    def kernel(self, target: Target, inputs=None, grad_out=None):
        inputs, grad_out = inputs or self.inputs, self.grad_out if grad_out is None else grad_out
        return self.call(
            involution,
            [on_device(t, target.device) for t in inputs],
            on_device(grad_out, target.device),
            backend=target.backend,
        )

    def exact(self, inputs=None, grad_out=None):
        inputs, grad_out = inputs or self.inputs, self.grad_out if grad_out is None else grad_out
        return self.call(involution_ref, [t.double() for t in inputs], grad_out.double())

    def floors(self, inputs, grad_out):
        """What the sums cost in the precision they run in, to first order.

        Each of n additions rounds a partial sum, by half a unit; the partial sums grow like the root of their terms in
        quadrature, so all roundings together come to about sqrt(n) units of that root. Terms that are all alike round
        alike. In float64 the exact answer costs as much.
        """
        squares = self.call(involution_ref, [t.double().square() for t in inputs], grad_out.double().square())
        taps, group = inputs[1].shape[2] ** 2, inputs[0].shape[1] / max(inputs[1].shape[1], 1)
        unit = torch.finfo(self.wide).eps * (2 if self.dtype == torch.float64 else 1)
        alike = all(
            stride == 0 or size == 1 for size, stride in zip(inputs[0].shape[1:], inputs[0].stride()[1:], strict=True)
        )
        power = 1.0 if alike else 0.5
        return [
            unit * terms**power * t.max().item() ** 0.5 if t.numel() else 0.0
            for terms, t in zip((taps, taps, group), squares, strict=True)
        ]

    def check_values(self, actual, inputs=None, grad_out=None):
        inputs, grad_out = inputs or self.inputs, self.grad_out if grad_out is None else grad_out
        same, exact = self.call(involution_ref, inputs, grad_out), self.exact(inputs, grad_out)
        for name, floor, *values in zip(NAMES, self.floors(inputs, grad_out), actual, same, exact, strict=True):
            assert values[0].dtype == self.dtype
            assert_twofold(*values, self.dtype, floor, name)

    def check(self, target, inputs=None, grad_out=None):
        actual = self.kernel(target, inputs, grad_out)
        assert all(t.device.type == target.device for t in actual)
        self.check_values(actual, inputs, grad_out)
