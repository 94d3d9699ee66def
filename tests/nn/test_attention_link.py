"""AttentionLink: Eq. 4 and 5 written out in float64, its start, its mask and its errors."""

import math

import pytest
import torch
from torch import nn

from fastib.nn import AttentionLink


def by_hand(link: AttentionLink, attn: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4 as the convolution the paper uses, and Eq. 5 as the mean of squared differences of unit vectors."""
    weight = link.weight if link.mask is None else link.weight * link.mask
    augmented = nn.functional.conv2d(attn.unsqueeze(-1), weight[:, :, None, None], link.bias).squeeze(-1)
    units = [x / x.square().sum(2, keepdim=True).sqrt() for x in (augmented, target)]
    return augmented, (units[0] - units[1]).square().mean()


@pytest.mark.parametrize("masked", [False, True])
def test_equations_4_and_5(masked):
    torch.manual_seed(0)
    mask = torch.rand(7, 6) < 0.5 if masked else None
    link = AttentionLink(6, 7, mask, dtype=torch.float64)
    attn = torch.randn(3, 6, 20, dtype=torch.float64).softmax(-1).requires_grad_()
    target = torch.randn(3, 7, 20, dtype=torch.float64)
    augmented, loss = by_hand(link, attn, target)
    torch.testing.assert_close(link(attn), augmented, rtol=1e-12, atol=1e-14)
    inputs = [attn, link.weight, link.bias]
    torch.testing.assert_close(link.loss(attn, target), loss, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(loss, inputs)
    for actual, e in zip(torch.autograd.grad(link.loss(attn, target), inputs), expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-9, atol=1e-13)
    if masked:
        assert expected[1][~mask].eq(0).all()
    per_map = link.loss(attn, target, reduction="none")
    torch.testing.assert_close(per_map.sum() / target.numel(), loss, rtol=1e-12, atol=0)
    assert link.loss(attn, target) <= 4 / 20


def test_the_papers_number_of_links():
    link = AttentionLink(12 * 6, 952)
    assert link.weight.numel() == 68_544 and sum(p.numel() for p in link.parameters()) == 69_496


def test_starts_as_a_convolution():
    torch.manual_seed(3)
    link = AttentionLink(50, 400)
    torch.manual_seed(3)
    conv = nn.Conv2d(50, 400, 1)
    torch.testing.assert_close(link.weight, conv.weight[:, :, 0, 0], rtol=0, atol=0)
    torch.testing.assert_close(link.bias, conv.bias, rtol=0, atol=0)
    weight = link.weight.detach()
    assert weight.abs().max() <= 50**-0.5 and math.isclose(weight.std(), (3 * 50) ** -0.5, rel_tol=0.02)


def test_mask_is_saved_and_moved_and_not_shared():
    mask = torch.eye(3, dtype=torch.bool)
    link = AttentionLink(3, 3, mask)
    mask.zero_()
    assert link.mask.sum() == 3 and link.half().mask.dtype == torch.bool
    other = AttentionLink(3, 3, torch.ones(3, 3, dtype=torch.bool)).half()
    other.load_state_dict(link.state_dict())
    assert other.mask.equal(link.mask) and "links=3" in repr(other)
    assert set(AttentionLink(3, 3).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "in_maps must be at least 1, got 0"),
        ((2, 0), "out_maps must be at least 1, got 0"),
        ((2, 3, torch.ones(2, 3, dtype=torch.bool)), r"mask must be bool of shape \(3, 2\), got torch.bool \(2, 3\)"),
        ((2, 3, torch.ones(3, 2)), "mask must be bool"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"AttentionLink: {message}"):
        AttentionLink(*arguments)


def test_bad_targets_are_named():
    link = AttentionLink(2, 3)
    with pytest.raises(ValueError, match=r"target must be of shape \(1, 3, 4\)"):
        link.loss(torch.rand(1, 2, 4), torch.rand(1, 2, 4))
