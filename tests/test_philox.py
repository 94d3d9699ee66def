"""Philox: the published generator, the same bits in C++ and in Python, and masks that are fair."""

import importlib

import pytest
import torch

from fastib import _native
from fastib.reference.philox import draw_seed, drop_threshold, keep_factor, keep_mask, random_words

SEEDS = (0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63), 0x243F6A8885A308D3)
MASK = 0xFFFFFFFF


def philox4x32(counter, key, rounds=10):
    """The generator as Salmon et al. (2011) state it, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    """The published test vectors of Random123."""
    assert philox4x32(counter, key) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1])
def test_words_are_philox(seed, stream):
    key = (seed & MASK, (seed >> 32) & MASK)
    expected = [word for c in range(5) for word in philox4x32((c, 0, stream, 0), key)]
    assert random_words(seed, 18, stream).tolist() == expected[:18]
    assert random_words(torch.tensor([seed]), 18, stream).tolist() == expected[:18]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_same_mask_in_cpp(seed, p):
    if not _native.lib_available():
        pytest.skip(_native.why_not())
    kernels = importlib.import_module("fastib._kernels")
    for stream in (0, 1):
        cpp = torch.from_numpy(kernels.keep_mask(seed & (2**64 - 1), stream, 1001, p))
        assert torch.equal(cpp, keep_mask(seed, (1001,), p, stream))


def test_mask_depends_on_element_alone():
    whole = keep_mask(7, (4, 3, 5, 5), 0.4, 0)
    assert torch.equal(keep_mask(7, (2, 3, 5, 5), 0.4, 0), whole[:2])
    assert not torch.equal(keep_mask(7, (4, 3, 5, 5), 0.4, 1), whole)
    assert not torch.equal(keep_mask(8, (4, 3, 5, 5), 0.4, 0), whole)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keeps_the_right_share(p):
    count = 1_000_000
    kept = keep_mask(123, (count,), p, 0).double()
    spread = (p * (1 - p) / count) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * spread
    neighbours = ((kept[1:] - kept.mean()) * (kept[:-1] - kept.mean())).mean().item()
    assert abs(neighbours) < 5 * p * (1 - p) / count**0.5


def test_ends_of_the_range():
    assert drop_threshold(0.0) == 0 and drop_threshold(1.0) == MASK and drop_threshold(0.5) == 2**31
    assert keep_factor(0.0) == 1.0 and keep_factor(0.5) == 2.0 and keep_factor(1.0) == 0.0
    assert keep_mask(3, (64,), 0.0, 0).all()
    assert random_words(3, 0, 0).shape == (0,)
    assert keep_mask(3, (0, 5), 0.5, 0).shape == (0, 5)


def test_seed_comes_from_torch_generator():
    torch.manual_seed(5)
    first = draw_seed()
    second = draw_seed()
    torch.manual_seed(5)
    assert torch.equal(draw_seed(), first) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (1,)


@pytest.mark.gpu
def test_same_words_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for seed in SEEDS:
        assert torch.equal(random_words(seed, 1001, 1, "cuda").cpu(), random_words(seed, 1001, 1))
