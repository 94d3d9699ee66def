"""From a `DataConfig` to loaders: the digits, an image folder, CIFAR, or whatever timm's create_dataset reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import RandomCrop
from torchvision.transforms.functional import resize

from fastib.train import cifar, digits
from fastib.train.config import DataConfig
from fastib.train.errors import DataError
from fastib.train.sampling import EvalBatches, Key, Stream, TrainBatches
from fastib.train.seeding import AUGMENT, seeded


@dataclass
class Data:
    """Training and evaluation sets. They are indexed by `Key`, or are `Stream`s."""

    train: Dataset
    eval: Dataset

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1, world: int = 1) -> int:
        """Whole batches in the training set. Raises ConfigError where there is none, or where it cannot be split."""
        if isinstance(self.train, Stream):
            return max(len(self.train) * world // batch_size, 1)
        return TrainBatches(len(self.train), batch_size, 0, stop=0, accumulate=accumulate, world=world).steps

    def train_loader(self, config: DataConfig, seed: int, *, start: int, stop: int, accumulate=1, rank=0, world=1):
        """Iterator over the micro-batches of the steps from `start` to `stop` of this process."""
        if isinstance(self.train, Stream):
            part = config.batch_size // (accumulate * world)
            loader = iter(DataLoader(self.train, batch_size=part, drop_last=True, **_workers(config)))
            for _ in range(start * accumulate):
                next(loader)
            return loader
        batches = TrainBatches(
            len(self.train), config.batch_size, seed, start=start, stop=stop, accumulate=accumulate,
            repeats=config.augment.repeats, rank=rank, world=world,
        )  # fmt: skip
        return iter(self._loader(self.train, config, batches))

    def eval_loader(self, config: DataConfig, rank: int = 0, world: int = 1) -> tuple[DataLoader, int | None]:
        """The loader of this process, and how many of its leading images count (None: all)."""
        if isinstance(self.eval, Stream):
            return DataLoader(self.eval, batch_size=config.eval_batch_size, **_workers(config)), None
        batches = EvalBatches(len(self.eval), config.eval_batch_size, rank=rank, world=world)
        return self._loader(self.eval, config, batches), batches.valid

    def _loader(self, dataset: Dataset, config: DataConfig, batches) -> DataLoader:
        if isinstance(dataset, digits.Digits):
            return DataLoader(dataset, batch_sampler=batches, collate_fn=lambda batch: batch)
        return DataLoader(dataset, batch_sampler=batches, **_workers(config))


def _workers(config: DataConfig) -> dict:
    return {"num_workers": config.workers, "pin_memory": torch.cuda.is_available()}


class Images(Dataset):
    """A map-style data set of timm or torchvision, indexed by `Key`; `indices` picks a subset."""

    def __init__(self, dataset, transform, mode: str, *, indices=None, seed: int = 0, training: bool = False):
        self.dataset, self.transform, self.mode = dataset, transform, mode
        self.indices = indices if indices is not None else range(len(dataset))
        self.seed, self.training = seed, training

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key):
        epoch, position, index = key
        image, target = self.read(int(self.indices[index]))
        if not self.training:
            return self.transform(image), target
        with seeded(self.seed, AUGMENT, epoch, position):
            return self.transform(image), target

    def read(self, index: int):
        """The decoded image and its label. Raises DataError naming the file; timm would step over it."""
        reader = getattr(self.dataset, "reader", None)
        try:
            if reader is None:
                image, target = self.dataset[index]
            else:
                image, target, *_ = reader[index]
                image = Image.open(image)
            return convert(image, self.mode), target
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = reader.filename(index, absolute=True) if reader is not None else f"number {index}"
            raise DataError(f"cannot read the image {name}: {error}") from error


def convert(image: Image.Image, mode: str) -> Image.Image:
    """`image` in 8 bits: "RGB" or "L". Of 16 bits the upper eight, where PIL cuts off all above 255.

    Raises ValueError for numbers of 32 bits, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got PIL's mode {image.mode}")
    return image.convert(mode)


class PaddedCrop:
    """Crops a square of an image's shorter side out of the image padded by so many pixels, and resizes it to `size`."""

    def __init__(self, padding: int, size: int, interpolation: str):
        self.padding, self.size, self.mode = padding, size, str_to_interp_mode(interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        crop = RandomCrop(min(image.size), padding=self.padding)(image)
        return crop if crop.size == (self.size, self.size) else resize(crop, [self.size, self.size], self.mode)


def build_data(config: DataConfig, seed: int = 0, rank: int = 0) -> Data:
    """Open the data sets that `config` names, and fill its None fields (sizes, classes, mean, std).

    Raises:
        DataError: a missing path, a path without classes, an empty class, splits, ``num_classes`` or ``classes`` that
            disagree.
    """
    small = config.name == "digits"
    config.img_size = config.img_size or (8 if small else 32 if config.name in cifar.NAMES else 224)
    config.in_chans = config.in_chans or (1 if small else 3)
    if config.in_chans not in (1, 3):
        raise DataError(f"data.in_chans must be 1 or 3, got {config.in_chans}")
    defaults = ("mean", digits.MEAN, IMAGENET_DEFAULT_MEAN), ("std", digits.STD, IMAGENET_DEFAULT_STD)
    for field, ours, imagenet in defaults:
        grey = [ours if small else float(np.mean(imagenet))] * config.in_chans
        value = getattr(config, field) or (grey if small or config.in_chans == 1 else list(imagenet))
        if len(value) != config.in_chans:
            raise DataError(f"data.{field} has {len(value)} values for {config.in_chans} channels")
        setattr(config, field, value)
    return _digits(config, seed) if small else _images(config, seed, rank)


def _digits(config: DataConfig, seed: int) -> Data:
    labels = digits.load_digits().target
    _set_classes(config, [str(digit) for digit in range(10)], 10, "the digits")
    train, test = train_test_split(np.arange(len(labels)), test_size=digits.TEST_IMAGES, stratify=labels,
                                   random_state=config.split_seed)  # fmt: skip
    train = train[_subset(labels[train], config)]
    augment = (config.augment.degrees, config.augment.translate, config.augment.zoom)
    shape = (config.img_size, config.in_chans, config.mean, config.std)
    return Data(digits.Digits(train, *shape, augment=augment, seed=seed), digits.Digits(test, *shape))


def _images(config: DataConfig, seed: int, rank: int) -> Data:
    mode = "RGB" if config.in_chans == 3 else "L"
    train, held_out = (_open(config, split, training, mode) for split, training in
                       ((config.train_split, True), (config.eval_split, False)))  # fmt: skip
    if config.name == "folder":
        _check_splits(config, train.reader.root, held_out.reader.root)
    _set_classes(config, *_find_classes(train, held_out, config), config.path or config.name)
    transforms = _transform(config, True), _transform(config, False)
    if isinstance(train, IterableDataset):
        if config.train_fraction < 1:
            raise DataError(f"data.train_fraction needs a data set with random access; {config.name} is a stream")
        return Data(Stream(train, transforms[0], seed=seed, rank=rank, training=True),
                    Stream(held_out, transforms[1], seed=seed, rank=rank))  # fmt: skip
    train_part, eval_part = np.arange(len(train)), np.arange(len(held_out))
    whole = config.eval_fraction == 1  # another folder, see `evaluate_run`
    if config.name == "folder" and train.reader.root == held_out.reader.root and not whole:
        train_part, eval_part = _split(_labels(train), 1 - config.eval_fraction, config.split_seed)
    if config.train_fraction < 1:
        train_part = train_part[_subset(_labels(train)[train_part], config)]
    return Data(Images(train, transforms[0], mode, indices=train_part, seed=seed, training=True),
                Images(held_out, transforms[1], mode, indices=eval_part))  # fmt: skip


def _open(config: DataConfig, split: str, training: bool, mode: str):
    folder = config.name == "folder"
    if folder and not config.path:
        raise DataError("data.path (--data) is needed for an image folder")
    if config.path and not config.download and not os.path.exists(config.path):
        raise DataError(f"the data path {config.path} does not exist")
    if config.name in cifar.NAMES:
        if config.path is None:
            raise DataError(f"data.path (--data) is needed for {config.name}: an archive as published, or its folder")
        return cifar.Cifar(config.name, Path(config.path), training=training)
    if not folder and "/" not in config.name:
        known = ", ".join(("digits", "folder", *cifar.NAMES))
        raise DataError(f"data.name: expected {known} or a name of timm's such as hfds/..., got {config.name!r}")
    options = {} if config.name.startswith("torch/") else {"input_img_mode": mode}
    try:
        dataset = create_dataset(
            "" if folder else config.name, root=config.path, split=split, is_training=training,
            download=config.download, batch_size=config.batch_size, **options, **config.kwargs,
        )  # fmt: skip
    except Exception as error:
        if folder and "Found 0 images" in str(error):
            raise DataError(f"{config.path} holds no images: expected one folder of images per class") from error
        raise DataError(f"cannot open the data set {config.name} at {config.path}, split {split}: {error}") from error
    if folder and os.path.isdir(config.path):
        _check_folder(Path(dataset.reader.root), dataset.reader.class_to_idx)
    return dataset


def _check_splits(config: DataConfig, train_root: str, eval_root: str) -> None:
    """timm takes the whole folder for a split that it does not find there, the other split's images included."""
    for split, root, other in (("train_split", train_root, eval_root), ("eval_split", eval_root, train_root)):
        if root == config.path != other:
            raise DataError(
                f"{config.path} has the folder {Path(other).name}, but none for data.{split}={getattr(config, split)}: "
                f"name it, or set data.{split}={Path(other).name} to split the images of that folder"
            )


def _check_folder(root: Path, classes: dict[str, int]) -> None:
    if len(classes) < 2:
        raise DataError(f"{root} holds {len(classes)} class(es) ({', '.join(classes)}): expected one folder per class")
    if "" in classes:
        raise DataError(f"{root} holds images outside of the folders of its classes: expected one folder per class")
    extensions = get_img_extensions(as_set=True)
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if not subfolders and not any(Path(name).suffix.lower() in extensions for name in files):
            raise DataError(f"the class folder {folder} holds no images")


def _find_classes(train, held_out, config: DataConfig) -> tuple[list[str] | None, int | None]:
    """Names of the classes in the order of their labels, and how many, where the data sets tell."""
    numbers = [getattr(getattr(d, "reader", None), "class_to_idx", None) or getattr(d, "class_to_idx", None)
               for d in (train, held_out)]  # fmt: skip
    if all(numbers) and numbers[0] != numbers[1]:
        odd = sorted(map(str, set(numbers[0]) ^ set(numbers[1])))
        raise DataError(f"the training and test images of {config.path} differ in these classes: {_some(odd)}")
    if numbers[0]:
        return [str(name) for name in sorted(numbers[0], key=numbers[0].get)], len(numbers[0])
    return None, len(train.classes) if getattr(train, "classes", None) else None


def _set_classes(config: DataConfig, names: list[str] | None, found: int | None, where: str) -> None:
    if None not in (names, config.classes) and names != config.classes:
        differences = {
            "missing": [name for name in config.classes if name not in names],
            "unknown": [name for name in names if name not in config.classes],
        }
        parts = [f"{kind}: {_some(odd)}" for kind, odd in differences.items() if odd]
        parts = parts or [f"the same in another order: {_some(names)}; expected: {_some(config.classes)}"]
        raise DataError(f"the classes of {where} are not those of the run (data.classes): {'; '.join(parts)}")
    if found is None and config.num_classes is None:
        raise DataError(f"{where} does not tell how many classes it has: set data.num_classes")
    if None not in (found, config.num_classes) and found != config.num_classes:
        raise DataError(f"data.num_classes={config.num_classes}, but {where} has {found} classes")
    config.num_classes = config.num_classes or found
    config.classes = config.classes or names


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _labels(dataset) -> np.ndarray:
    reader = getattr(dataset, "reader", None)
    if hasattr(reader, "samples"):
        return np.array([label for _, label in reader.samples])
    if hasattr(reader, "iter_targets"):
        return np.array(list(reader.iter_targets()))
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    raise DataError(f"a stratified subset needs the labels, and {type(dataset).__name__} does not list them")


def _subset(labels: np.ndarray, config: DataConfig) -> np.ndarray:
    if config.train_fraction >= 1:
        return np.arange(len(labels))
    return _split(labels, config.train_fraction, config.split_seed)[0]


def _split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified: two sorted index arrays, the first with `fraction` of the images."""
    try:
        parts = train_test_split(np.arange(len(labels)), train_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise DataError(f"cannot take a stratified fraction {fraction:g} of {len(labels)} images: {error}") from error
    return np.sort(parts[0]), np.sort(parts[1])


def _transform(config: DataConfig, training: bool):
    a = config.augment
    options = {
        "input_size": (config.in_chans, config.img_size, config.img_size), "is_training": training,
        "interpolation": a.interpolation, "mean": tuple(config.mean), "std": tuple(config.std),
    }  # fmt: skip
    if not training:
        return create_transform(**options, crop_pct=config.crop_pct)
    try:
        transform = create_transform(
            **options, scale=tuple(a.scale), ratio=tuple(a.ratio), hflip=a.hflip, vflip=a.vflip,
            color_jitter=a.color_jitter, auto_augment=a.auto_augment,
            re_prob=a.reprob, re_mode=a.remode, re_count=a.recount,
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(f"data.augment.auto_augment={a.auto_augment}: {error}") from error
    if a.crop_padding is not None:
        transform.transforms[0] = PaddedCrop(a.crop_padding, config.img_size, a.interpolation)
    return transform
