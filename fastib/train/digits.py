"""The embedded data set: scikit-learn's handwritten digits, 1797 grey images of 8 x 8 pixels in ten classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from fastib.train.sampling import Key
from fastib.train.seeding import AUGMENT, generator

MEAN, STD = 0.3053, 0.3760  # of all pixels, in [0, 1]
TEST_IMAGES = 360


class Digits(Dataset):
    """Some of the digits as tensors, read and augmented a batch at a time.

    Each image is resampled once to `size`, in training through a random rotation, zoom and shift. Bicubic: at 8 x 8
    pixels a bilinear kernel blurs so much that a model trained on augmented images does not know the sharp ones.

    Args:
        indices: which of the 1797 images.
        size: side of the images that come out.
        channels: the grey value is repeated so often.
        mean, std: per channel, in [0, 1] pixel values.
        augment: (degrees, translate, zoom) of `AugmentConfig`, or None.
        seed: seed of the augmentation.
    """

    def __init__(self, indices, size: int, channels: int, mean, std, augment=None, seed: int = 0):
        digits = load_digits()
        self.images = torch.from_numpy(digits.images[indices]).float().div_(16).unsqueeze(1)
        self.labels = torch.from_numpy(digits.target[indices]).long()
        self.size, self.channels, self.augment, self.seed = size, channels, augment, seed
        self.mean, self.std = (torch.tensor(list(v)).view(1, -1, 1, 1) for v in (mean, std))
        self.table = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.labels)

    def draws(self, epoch: int) -> Tensor:
        """(len, 4) numbers in [-1, 1): angle, zoom and the two shifts of each position of `epoch`."""
        if self.table[0] != epoch:
            self.table = (epoch, 2 * torch.rand(len(self), 4, generator=generator(self.seed, AUGMENT, epoch)) - 1)
        return self.table[1]

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        """Images (B, channels, size, size) and labels (B,)."""
        epochs, positions, indices = zip(*keys, strict=True)
        images = self.images[list(indices)]
        theta = torch.eye(2, 3).repeat(len(keys), 1, 1)
        if self.augment is not None:
            draws = torch.stack([self.draws(e)[p] for e, p in zip(epochs, positions, strict=True)])
            theta = affine(draws, *self.augment)
        grid = F.affine_grid(theta, [len(keys), 1, self.size, self.size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bicubic", align_corners=False)
        images = (images.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        return images, self.labels[list(indices)]

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]


def affine(draws: Tensor, degrees: float, translate: float, zoom: float) -> Tensor:
    """(B, 2, 3) maps from output to input coordinates in [-1, 1], for (B, 4) draws in [-1, 1)."""
    angle = draws[:, 0] * math.radians(degrees)
    scale = 1 + draws[:, 1] * zoom
    shift = draws[:, 2:] * 2 * translate
    cos, sin = angle.cos() / scale, angle.sin() / scale
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
