"""What the GPU kernels do not take: backend=None goes to the reference, a named backend says why. Needs no GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from fastib import _gpu_limits as limits
from fastib import ops
from fastib.ops import _backend

HALF = torch.bfloat16
# operator, shapes of the tensors that it chooses by, dtype, and why its GPU kernels do not take them
CASES = [
    ("mhca_attention", [(2, 3, 17, 64)], torch.float32, None),
    ("mhca_attention", [(2, 3, 17, 257)], torch.float32, r"D <= 256, got \(2, 3, 17, 257\)"),
    ("mhca_attention", [(1, 1, (1 << 20) + 1, 16)], HALF, "N <= 1048576"),
    ("mhca_attention", [(2, 3, 17, 64)], torch.float64, "float64"),
    ("cls_attention_maps", [(2, 3, 17, 256)], HALF, None),
    ("cls_attention_maps", [(2, 3, 17, 320)], HALF, "D <= 256"),
    ("head_token_attention", [(2, 3, 17, 64), (2, 3, 31, 64)], torch.float32, None),
    ("head_token_attention", [(2, 3, 17, 64), (2, 3, 32, 64)], torch.float32, "less than 32 extra tokens"),
    ("head_token_attention", [(2, 3, 17, 72), (2, 3, 16, 72)], torch.float32, "less than 16 extra tokens"),
    ("head_token_attention", [(2, 3, 17, 72), (2, 3, 63, 72)], HALF, None),
    ("head_token_attention", [(2, 3, 17, 72), (2, 3, 64, 72)], HALF, "less than 64 extra tokens"),
    ("feature_alignment_loss", [(2, 17, 16384)], HALF, None),
    ("feature_alignment_loss", [(2, 17, 16385)], HALF, "up to 16384 channels, got 16385"),
    ("attention_link_loss", [(2, 17, 49)], torch.float64, "float64"),
    ("depthwise_block", [(2, 49, 64)], torch.float64, "float64"),
    ("involution", [(2, 4, 5, 5)], torch.float16, None),
    ("involution", [(2, 4, 5, 5)], torch.float64, "float64"),
    ("generalized_conv", [(2, 4, 5, 5)], torch.float64, "float64"),
]


@pytest.mark.parametrize(("name", "shapes", "dtype", "reason"), CASES)
def test_choice(monkeypatch, name, shapes, dtype, reason):
    op = _backend.OPS[name]
    monkeypatch.setattr(op, "no_gpu_code", None)
    monkeypatch.setattr(op, "gpu_default", op.gpu)
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda:0") for shape in shapes]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert op.choose(None, *tensors) == (op.gpu if reason is None else "reference")
        if reason is None:
            assert op.choose(op.gpu, *tensors) == op.gpu
        else:
            with pytest.raises(RuntimeError, match=f"{name}: backend='{op.gpu}' is not available: .*{reason}"):
                op.choose(op.gpu, *tensors)


def test_result_beyond_the_limits(monkeypatch):
    """The public functions choose by the right tensors: fakes go through the reference alone."""
    for name in ("mhca_attention", "cls_attention_maps", "head_token_attention", "feature_alignment_loss"):
        monkeypatch.setattr(_backend.OPS[name], "gpu_default", "triton")
    refuse = pytest.fail
    with FakeTensorMode():
        q, x = (torch.empty(2, 3, n, 320, device="cuda:0") for n in (17, 5))
        alpha, center = torch.empty(3, device="cuda:0"), torch.empty(3, 2, device="cuda:0")
        for module in ("mhca_attention", "cls_attention", "head_token_attention", "feature_alignment"):
            monkeypatch.setattr(sys.modules[f"fastib.ops.{module}"], "_forward", refuse)
        assert ops.mhca_attention(q, q, q, alpha, center, 4).shape == q.shape
        assert ops.cls_attention_maps(q[:, :, 0], q).shape == (2, 3, 16)
        assert ops.head_token_attention(q, q, q, x, x, x).shape == q.shape
        extra = q[..., :64].repeat(1, 1, 2, 1)
        assert ops.head_token_attention(*[q[..., :64]] * 3, extra, extra, extra).shape == (2, 3, 17, 64)
        tokens = torch.empty(2, 4, 20000, device="cuda:0")
        assert ops.feature_alignment_loss(tokens, tokens).shape == ()


class Limits(torch.nn.Module):
    def forward(self, q, tokens):
        reasons = limits.head_token_attention(q, tokens[None]), limits.feature_alignment(tokens)
        return q + sum(reason is None for reason in reasons)


def test_compiled_for_any_size():
    """One graph serves all sizes that the kernels take, and a size above a limit is not taken for one of them."""
    q, counter = torch.zeros(2, 3, 40, 72), CompileCounter()
    compiled = torch.compile(Limits(), fullgraph=True, dynamic=True, backend=counter)
    for channels in (8, 20, 16384):
        assert compiled(q, torch.zeros(2, 5, channels)).max() == 2
    assert counter.frame_count == 1
    assert compiled(q, torch.zeros(2, 5, 16385)).max() == 1


def test_exported_for_any_size():
    sizes = {2: torch.export.Dim("tokens")}, {2: torch.export.Dim("channels")}
    program = torch.export.export(Limits(), (torch.zeros(2, 3, 40, 72), torch.zeros(2, 5, 8)), dynamic_shapes=sizes)
    assert program.module()(torch.zeros(2, 3, 41, 72), torch.zeros(2, 5, 20000)).max() == 2
