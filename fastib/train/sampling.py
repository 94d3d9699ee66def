"""Which images go into which batch: a function of (seed, step) alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from fastib.train.errors import ConfigError
from fastib.train.seeding import AUGMENT, ORDER, generator, seeded

Key = tuple[int, int, int]
"""(epoch, position in the epoch, index of the image): what the data sets here are indexed by."""


class TrainBatches(Sampler[list[Key]]):
    """Micro-batches of one process from step `start` to step `stop`, across epochs.

    The batch of a step is a slice of the epoch's permutation. It is cut into `accumulate` micro-batches and each of
    those into `world` parts, so the images of a step depend on neither. Images that fill no whole batch are left for
    another epoch. With `repeats` above 1 each image of the permutation stands that many times in a row, and the epoch
    keeps its length (repeated augmentation, Hoffer et al. 2020).
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, *, stop: int, start: int = 0, accumulate: int = 1,
        repeats: int = 1, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        if batch_size > size:
            raise ConfigError(f"data.batch_size={batch_size} is more than the {size} training images")
        if batch_size % (accumulate * world):
            raise ConfigError(
                f"data.batch_size={batch_size} does not split into grad_accum={accumulate} x {world} processes"
            )
        self.size, self.batch_size, self.seed, self.repeats = size, batch_size, seed, repeats
        self.steps = size // batch_size  # of an epoch
        self.start, self.stop = start, stop
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def order(self, epoch: int) -> list[int]:
        """Indices of the images in the order of `epoch`."""
        order = torch.randperm(self.size, generator=generator(self.seed, ORDER, epoch))
        return order.repeat_interleave(self.repeats)[: self.size].tolist()

    def __iter__(self) -> Iterator[list[Key]]:
        part = self.batch_size // (self.accumulate * self.world)
        current, order = None, []
        for step in range(self.start, self.stop):
            epoch, index = divmod(step, self.steps)
            if epoch != current:
                current, order = epoch, self.order(epoch)
            for micro in range(self.accumulate):
                first = index * self.batch_size + (micro * self.world + self.rank) * part
                yield [(epoch, position, order[position]) for position in range(first, first + part)]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


class EvalBatches(Sampler[list[Key]]):
    """All images in order, dealt out to the processes; the last ones are padded so that all have as many batches."""

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world: int = 1):
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world

    @property
    def valid(self) -> int:
        """How many of this process's leading images are no padding."""
        return len(range(self.rank, self.size, self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        padded = math.ceil(self.size / self.world) * self.world
        keys = [(0, position, position % self.size) for position in range(self.rank, padded, self.world)]
        for first in range(0, len(keys), self.batch_size):
            yield keys[first : first + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.size / self.world) / self.batch_size)


class Stream(IterableDataset):
    """A sequential data set of timm's (``wds/``, ``tfds/``, ``hfids/``); in training it goes on for ever.

    It cannot be entered in the middle: a resumed run reads and drops what it had already seen.
    """

    def __init__(self, dataset, transform, *, seed: int, rank: int = 0, training: bool = False):
        self.dataset, self.transform = dataset, transform
        self.seed, self.rank, self.training = seed, rank, training

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self):
        worker = get_worker_info()
        place = (self.rank, worker.id if worker else 0)
        for epoch in itertools.count() if self.training else (0,):
            if self.training:
                self.dataset.set_epoch(epoch)
            count = -1
            for count, (image, target) in enumerate(self.dataset):
                with seeded(self.seed, AUGMENT, epoch, *place, count):
                    image = self.transform(image)
                yield image, target
            if count < 0:
                return
