"""CIFAR-10 and CIFAR-100 as published: their archives of binary or of pickled batches, packed or unpacked.

No pickled code is ever run. Pickled batches are read by an unpickler that knows four names, those by which an array
is rebuilt, and has a stand-in of its own for each; any other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fastib.train.errors import DataError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The files of one of the two data sets.

    Attributes:
        prefix: of the names of its archives and folders.
        classes: how many.
        label_bytes: before the pixels of a binary record; the last one is the label.
        label_key: name of the labels in a pickled batch.
        binary, pickled: names of the training files, and then that of the test file.
        names: files of the classes' names beside binary and beside pickled batches, and what they are called in the
            latter.
    """

    prefix: str
    classes: int
    label_bytes: int
    label_key: bytes
    binary: tuple[str, ...]
    pickled: tuple[str, ...]
    names: tuple[str, str, bytes]


_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
NAMES = {
    "cifar10": Layout("cifar-10-", 10, 1, b"labels", tuple(f"{name}.bin" for name in _BATCHES), _BATCHES,
                      ("batches.meta.txt", "batches.meta", b"label_names")),
    "cifar100": Layout("cifar-100-", 100, 2, b"fine_labels", ("train.bin", "test.bin"), ("train", "test"),
                       ("fine_label_names.txt", "meta", b"fine_label_names")),
}  # fmt: skip


class Cifar(Dataset):
    """PIL images of 32 x 32 pixels and fine labels, held in memory.

    `classes` are their numbers. `class_to_idx` has their names, or is None where the file of them is not there.

    Args:
        name: "cifar10" or "cifar100".
        path: an archive (cifar-10-binary.tar.gz, cifar-10-python.tar.gz and those of CIFAR-100), a folder that one was
            unpacked into, or a folder that holds either.
        training: the training images or the test images.

    Raises:
        DataError: nothing of the kind at `path`, or files that are cut short or not what they should be.
    """

    def __init__(self, name: str, path: Path, training: bool):
        self.layout = layout = NAMES[name]
        files = _files(path, layout.prefix)
        kind = next((names for names in (layout.binary, layout.pickled) if all(n in files for n in names)), None)
        if kind is None:
            raise DataError(
                f"{path} does not hold {name}: expected {layout.prefix}binary.tar.gz, {layout.prefix}python.tar.gz or "
                f"one of them unpacked, with all of {', '.join(layout.binary)}"
            )
        read = self._read_binary if kind is layout.binary else self._read_pickled
        parts = [read(files[file]) for file in (kind[:-1] if training else kind[-1:])]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if not 0 <= labels.min() <= labels.max() < layout.classes:
            raise DataError(f"{path}: expected labels from 0 to {layout.classes - 1}, got {labels.max()}")
        self.images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.targets = labels.astype(np.int64)
        self.classes = list(range(layout.classes))
        self.class_to_idx = self._read_names(files, kind is layout.binary)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])

    def _read_binary(self, file: File) -> tuple[np.ndarray, np.ndarray]:
        """Records of label bytes and then the red, the green and the blue plane."""
        before, content = self.layout.label_bytes, file.read()
        if not content or len(content) % (before + PIXELS):
            raise DataError(f"{file}: expected records of {before + PIXELS} bytes, got {len(content)} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, before + PIXELS)
        return records[:, before:], records[:, before - 1]

    def _read_pickled(self, file: File) -> tuple[np.ndarray, np.ndarray]:
        key = self.layout.label_key
        try:
            batch = _unpickled(file)
            images, labels = batch[b"data"].array(), np.array(batch[key])
        except Exception as error:  # whatever a file that is not one of them may provoke
            raise DataError(f"{file}: expected a pickled batch with data and {key.decode()}: {error}") from error
        if not len(images) or images.shape != (len(labels), PIXELS) or labels.ndim != 1 or labels.dtype.kind != "i":
            raise DataError(f"{file}: expected a label for each of the images of {PIXELS} bytes, got {labels.shape} "
                            f"{labels.dtype} labels for {images.shape} images")  # fmt: skip
        return images, labels

    def _read_names(self, files: dict[str, File], binary: bool) -> dict[str, int] | None:
        text, pickled, key = self.layout.names
        file = files.get(text if binary else pickled)
        if file is None:
            return None
        try:
            lines = file.read().split(b"\n") if binary else _unpickled(file)[key]
            names = [line.decode().strip() for line in lines if line.strip()]
        except Exception as error:
            raise DataError(f"{file}: expected the names of the classes: {error}") from error
        if len(set(names)) != len(names) or len(names) != self.layout.classes:
            raise DataError(f"{file}: expected {self.layout.classes} names of classes, got {names}")
        return {name: number for number, name in enumerate(names)}


class _Array:
    """Stands in for a NumPy array of bytes, and for the function and the class that rebuild one."""

    def __init__(self, *args: Any):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, column_major, content = self.state
        if dtype.args[:1] not in ((b"u1",), ("u1",)):
            raise ValueError(f"expected bytes, got an array of {dtype.args}")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")


class _Dtype:
    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: tuple) -> None:
        pass


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    STAND_INS: ClassVar[dict] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and no pickled code is run")
        return self.STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names something outside of the file")


def _unpickled(file: File) -> Any:
    return _Unpickler(io.BytesIO(file.read()), encoding="bytes").load()


@dataclass
class File:
    """A file in a folder or in an archive."""

    path: Path
    member: str | None = None

    def read(self) -> bytes:
        if self.member is None:
            return self.path.read_bytes()
        with tarfile.open(self.path) as archive:
            return archive.extractfile(self.member).read()

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"


def _files(path: Path, prefix: str) -> dict[str, File]:
    """Files by name: those in the archive `path`, or in the folder and in its folders and archives of `prefix`."""
    try:
        if path.is_file():
            with tarfile.open(path) as archive:
                return {Path(m.name).name: File(path, m.name) for m in archive.getmembers() if m.isfile()}
        found: dict[str, File] = {}
        for archive in sorted(path.glob(f"{prefix}*.tar.gz")):
            found |= _files(archive, prefix)
        unpacked = [*sorted(path.glob(f"{prefix}*/*")), *sorted(path.glob("*"))]
        return found | {file.name: File(file) for file in unpacked if file.is_file()}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
