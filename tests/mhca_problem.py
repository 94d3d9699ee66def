"""One call of mhca_attention as a test sees it: inputs, the exact answer, and what rounding alone may cost."""

import torch
from helpers import Target, assert_twofold, expanded, on_device, packed, sliced, transposed_rows, value_and_grads

from fastib.ops import mhca_attention
from fastib.reference import mhca_attention_ref
from fastib.reference.mhca_attention import ATTN_STREAM, RPE_STREAM, position_term
from fastib.reference.philox import keep_factor, keep_mask

NAMES = ("out", "grad_q", "grad_k", "grad_v", "grad_alpha", "grad_center")
LAYOUTS = {
    "packed": lambda q, k, v, g: (*packed(q, k, v), g),
    "sliced": lambda *t: tuple(map(sliced, t)),
    "rows_not_dense": lambda *t: tuple(map(transposed_rows, t)),
    "heads_last": lambda *t: tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in t),
    "expanded": lambda *t: tuple(map(expanded, t)),
    "one_row": lambda *t: tuple(x[:, :, :1].expand(x.shape) for x in t),
    "one_number": lambda *t: tuple(x[:1, :1, :1, :1].expand(x.shape) for x in t),
    "expanded_grad_out": lambda q, k, v, g: (q, k, v, g[:1, :1, :1, :1].expand(g.shape)),
    "reversed_batch": lambda *t: tuple(torch.stack(list(x.flip(0)), dim=-1).movedim(-1, 0).flip(0) for x in t),
}


class Problem:
    """Inputs of one call, the same on every device, and its exact answer."""

    def __init__(self, batch, heads, grid, head_dim, dtype, *, prefix=1, seed=0, logits=1.0, **options):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        tokens = prefix + grid[0] * grid[1]
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.grid, self.options = grid, {"num_prefix_tokens": prefix, **options}
        q, k, v, self.grad_out = (normal(batch, heads, tokens, head_dim).to(dtype) for _ in range(4))
        alpha = normal(heads).exp() * 0.5
        self.inputs = [q * logits, k, v, alpha.to(self.wide), normal(heads, 2).to(self.wide)]

    def call(self, function, inputs=None, grad_out=None, **options):
        grad_out = self.grad_out if grad_out is None else grad_out
        inputs = self.inputs if inputs is None else inputs
        return value_and_grads(lambda *x: function(*x, self.grid, **self.options, **options), inputs, grad_out)

    def kernel(self, target: Target, inputs=None, grad_out=None):
        inputs, grad_out = inputs or self.inputs, self.grad_out if grad_out is None else grad_out
        return self.call(
            mhca_attention,
            [on_device(t, target.device) for t in inputs],
            on_device(grad_out, target.device),
            backend=target.backend,
        )

    def reference(self, inputs=None, grad_out=None):
        return self.call(mhca_attention_ref, inputs, grad_out)

    def exact(self, inputs=None, grad_out=None):
        inputs, grad_out = inputs or self.inputs, self.grad_out if grad_out is None else grad_out
        return self.reference([t.double() for t in inputs], grad_out.double())

    def floors(self, inputs, grad_out):
        """What rounding costs by itself, to first order: the roundings of all terms of a sum, added in quadrature.

        A product of a sum has a few roundings of half a unit each, together one unit of the dtype; a score has as many
        in the precision of the softmax, which move its probability by as much as the score is large. Cancellation
        (dS sums to 0) makes this more than the rounding of the result. Images or rows that are alike err alike.
        """
        q, k, v, alpha, center = (t.double() for t in inputs)
        grad_out, options = grad_out.double(), {"scale": None, "rpe_dropout": 0.0, "attn_dropout": 0.0, **self.options}
        (batch, heads, tokens, head_dim), prefix = q.shape, options["num_prefix_tokens"]
        scale = head_dim**-0.5 if options["scale"] is None else options["scale"]
        rpe, attn = (options[name] for name in ("rpe_dropout", "attn_dropout"))
        keep_rpe = keep_attn = torch.ones(())
        if rpe:
            keep_rpe = keep_mask(options["seed"], (heads, tokens, tokens), rpe, RPE_STREAM) * keep_factor(rpe)
        if attn:
            keep_attn = keep_mask(options["seed"], (batch, heads, tokens, tokens), attn, ATTN_STREAM) * keep_factor(
                attn
            )
        bias = position_term(alpha, center, self.grid, prefix) * keep_rpe
        still, down, right = (
            position_term(alpha, torch.tensor(c, dtype=torch.float64).expand(heads, 2), self.grid, prefix) * keep_rpe
            for c in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])
        )
        parts = still.abs() + (bias - still).abs()
        logits = scale * q @ k.mT + bias
        score = 1 + abs(scale) * _root(q, k.mT) + parts
        p = logits.softmax(-1)
        kept = p * keep_attn
        unit, soft = torch.finfo(self.dtype).eps, torch.finfo(self.wide).eps
        rounding = unit + soft * score
        d_score = (
            p * (_root(grad_out, v.mT) * keep_attn + (grad_out * (kept @ v)).square().sum(-1, True).sqrt()) * rounding
        )
        to_alpha = position_term(torch.ones_like(alpha), center, self.grid, prefix) * keep_rpe
        alike = [n**0.5 if stride == 0 else 1.0 for n, stride in zip(q.shape, inputs[0].stride(), strict=True)]
        floors = (
            _root(kept * rounding, v),
            abs(scale) * _root(d_score, k),
            abs(scale) * _root(d_score.mT, q),
            _root((kept * rounding).mT, grad_out),
            *(
                alike[0] * (d_score * reach).square().sum((0, 2, 3)).sqrt()
                for reach in (to_alpha, torch.maximum((down - still).abs(), (right - still).abs()))
            ),
        )
        wider = 2 if self.dtype == torch.float64 else 1  # nothing wider to add up in
        return [t.max().item() * alike[2] * alike[3] * wider for t in floors]

    def check(self, target, inputs=None, grad_out=None):
        inputs, grad_out = inputs or self.inputs, self.grad_out if grad_out is None else grad_out
        actual, exact = self.kernel(target, inputs, grad_out), self.exact(inputs, grad_out)
        if (
            self.dtype == torch.float64
        ):  # what float32 loses here, at the scale of float64; the exact answer loses as much
            single = [t.float() for t in inputs]
            same, single_exact = self.reference(single, grad_out.float()), self.exact(single, grad_out.float())
            shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            same = [e + 1.5 * (s - x) * shrink for s, x, e in zip(same, single_exact, exact, strict=True)]
        else:
            same = self.reference(inputs, grad_out)
        for name, floor, *values in zip(NAMES, self.floors(inputs, grad_out), actual, same, exact, strict=True):
            assert values[0].dtype == self.dtype or name in ("grad_alpha", "grad_center")
            assert values[0].device.type == target.device
            assert_twofold(*values, self.dtype, floor, name)


def _root(a, b):
    """a @ b with terms added in quadrature."""
    return (a.square() @ b.square()).sqrt()
