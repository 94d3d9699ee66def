"""SOPE: the published layers and sizes."""

import pytest
import torch
from torch.nn import functional as F

from fastib.nn import SOPE


@pytest.mark.parametrize(
    ("patch", "dim", "count"),
    [(16, 192, 219_486), (16, 384, 874_422), (4, 192, 169_446), (4, 384, 670_662), (2, 192, 5_958), (2, 384, 11_910)],
)
def test_parameter_counts(patch, dim, count):
    assert sum(p.numel() for p in SOPE(patch, 3, dim).parameters()) == count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("patch", "size"), [(2, (6, 10)), (4, (8, 12)), (8, (16, 8)), (16, (32, 48)), (4, (9, 13))])
def test_layers(patch, size, training):
    """Affine, convolutions of stride 2 with BatchNorm, GELU behind all but the last of several, affine; row-major."""
    torch.manual_seed(0)
    module = SOPE(patch, 3, 24 if patch < 16 else 32).double().train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    y = x * module.pre.alpha + module.pre.beta
    count = patch.bit_length() - 1
    assert len(module.stages) == count
    for i, (conv, norm, _) in enumerate(module.stages):
        y = F.conv2d(y, conv.weight, None, 2, 1)
        mean, var = (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)) if training else (
            norm.running_mean, norm.running_var)  # fmt: skip
        y = (y - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
        if i + 1 < count or count == 1:
            y = F.gelu(y)
    y = y * module.post.alpha + module.post.beta
    out = module(x)
    assert out.shape[1:3] == (-(-size[0] // patch), -(-size[1] // patch)) and out.is_contiguous()
    torch.testing.assert_close(out, y.permute(0, 2, 3, 1), rtol=1e-10, atol=1e-11)


def test_synchronised_norms():
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(SOPE(16, 3, 32))
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in module.modules()) == 4


def test_errors():
    for patch in (1, 3, 12, 0, -4):
        with pytest.raises(ValueError, match=f"patch_size must be a power of 2 above 1, got {patch}"):
            SOPE(patch)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of patch_size / 2, got 20 and 16"):
        SOPE(16, 3, 20)
