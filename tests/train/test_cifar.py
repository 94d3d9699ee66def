"""CIFAR as published: binary and pickled batches, packed and unpacked; bad files, and files that would run code."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastib.train.build import load_student
from fastib.train.cifar import Cifar
from fastib.train.cli import main
from fastib.train.config import DataConfig, read_config
from fastib.train.data import PaddedCrop, build_data
from fastib.train.errors import DataError

SIZES = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
FOLDER = {"cifar10": "cifar-10-", "cifar100": "cifar-100-"}


def batches(name: str, each: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 3, 32, 32) and labels of every batch."""
    rng, classes = np.random.default_rng(0), {"cifar10": 10, "cifar100": 100}[name]
    return {batch: (rng.integers(0, 256, (each, 3, 32, 32), dtype=np.uint8), rng.integers(0, classes, each))
            for batch in SIZES[name]}  # fmt: skip


def published_array(array: np.ndarray) -> bytes:
    """An array as the archives have it: pickled by Python 2, protocol 2, with byte strings."""
    raw = array.tobytes()
    rows, columns = array.shape
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + b"U\x01b" + b"\x87R"
        + b"(K\x01" + b"K" + bytes([rows]) + b"M" + columns.to_bytes(2, "little") + b"\x86"
        + b"cnumpy\ndtype\n" + b"U\x02u1K\x00K\x01\x87R" + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89" + b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )  # fmt: skip


def pickled(name: str, images: np.ndarray, labels: np.ndarray) -> bytes:
    key = {"cifar10": b"labels", "cifar100": b"fine_labels"}[name]
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    coarse = b"U\x0dcoarse_labels](K\x01e" if name == "cifar100" else b""
    return (
        b"\x80\x02}(" + b"U\x04data" + published_array(images.reshape(len(images), -1))
        + b"U" + bytes([len(key)]) + key + numbers + coarse + b"u."
    )  # fmt: skip


def binary(name: str, images: np.ndarray, labels: np.ndarray) -> bytes:
    coarse = np.full((len(labels), 1), 7, np.uint8) if name == "cifar100" else np.empty((len(labels), 0), np.uint8)
    return np.concatenate([coarse, labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], 1).tobytes()


def class_names(name: str) -> list[str]:
    return [f"class_{number}" for number in range({"cifar10": 10, "cifar100": 100}[name])]


def names_file(name: str, kind: str) -> dict[str, bytes]:
    """The names of the classes: one a line and an empty line, or pickled beside others."""
    names = [text.encode() for text in class_names(name)]
    if kind == "binary":
        file = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}[name]
        return {file: b"\n".join([*names, b"", b""])}
    file, key = {"cifar10": ("batches.meta", b"label_names"), "cifar100": ("meta", b"fine_label_names")}[name]
    texts = b"".join(b"U" + bytes([len(text)]) + text for text in names)
    return {file: b"\x80\x02}(U\x07num_visM\x00\x0cU" + bytes([len(key)]) + key + b"](" + texts + b"eu."}


def files(name: str, kind: str) -> dict[str, bytes]:
    write, suffix = (binary, ".bin") if kind == "binary" else (pickled, "")
    contents = {f"{batch}{suffix}": write(name, *content) for batch, content in batches(name).items()}
    return contents | names_file(name, kind)


def lay_out(root: Path, name: str, kind: str, form: str) -> Path:
    """What a user has: the archive, a folder with it, the unpacked folder, or the folder around that."""
    inner = FOLDER[name] + {"cifar10": "batches-", "cifar100": ""}[name] + ("bin" if kind == "binary" else "py")
    if form in ("archive", "archive in a folder"):
        path = root / f"{FOLDER[name]}{'binary' if kind == 'binary' else 'python'}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for file, content in files(name, kind).items():
                info = tarfile.TarInfo(f"{inner}/{file}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path if form == "archive" else root
    (root / inner).mkdir()
    for file, content in files(name, kind).items():
        (root / inner / file).write_bytes(content)
    return root / inner if form == "unpacked" else root


@pytest.mark.parametrize("form", ["archive", "archive in a folder", "unpacked", "unpacked in a folder"])
@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_published_forms(name, kind, form, tmp_path):
    path = lay_out(tmp_path, name, kind, form)
    expected = batches(name)
    for training in (True, False):
        data = Cifar(name, path, training)
        chosen = list(expected.values())[:-1] if training else list(expected.values())[-1:]
        images, labels = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
        assert len(data) == len(labels) and data.targets.tolist() == labels.tolist()
        assert len(data.classes) == {"cifar10": 10, "cifar100": 100}[name]
        assert list(data.class_to_idx.items()) == [(text, i) for i, text in enumerate(class_names(name))]
        for i in (0, len(data) - 1):
            picture, label = data[i]
            assert picture.mode == "RGB" and label == labels[i]
            assert np.array_equal(np.asarray(picture), images[i].transpose(1, 2, 0))


def test_the_two_can_lie_in_one_folder(tmp_path):
    lay_out(tmp_path, "cifar10", "python", "archive in a folder")
    lay_out(tmp_path, "cifar100", "binary", "archive in a folder")
    assert len(Cifar("cifar10", tmp_path, True)) == 20 and len(Cifar("cifar100", tmp_path, True)) == 4


def test_numpys_own_pickles_are_read_too(tmp_path):
    """Pickled by this Python, whose byte strings go through `_codecs.encode`."""
    expected = batches("cifar100")
    for name, (images, labels) in expected.items():
        batch = {b"data": images.reshape(4, -1), b"fine_labels": labels.tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    data = Cifar("cifar100", tmp_path, False)
    assert np.array_equal(data.images, expected["test"][0].transpose(0, 2, 3, 1))
    assert data.class_to_idx is None  # no file has them


@pytest.mark.parametrize("content", [b"", b"no names", b"a\n" * 10, b"\xff\n" * 10, pickle.dumps({b"label_names": 3})])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_bad_names_of_classes(kind, content, tmp_path):
    lay_out(tmp_path, "cifar10", kind, "unpacked in a folder")
    (file,) = names_file("cifar10", kind)
    (next(tmp_path.glob("*")) / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"{file}: expected .*names of"):
        Cifar("cifar10", tmp_path, True)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_never_run(tmp_path):
    lay_out(tmp_path, "cifar100", "python", "unpacked in a folder")
    for file, key in (("meta", b"fine_label_names"), ("train", b"data")):
        (tmp_path / "cifar-100-py" / file).write_bytes(pickle.dumps({key: Bomb(tmp_path / "ran")}))
        with pytest.raises(DataError, match=rf"cifar-100-py/{file}.*it names pathlib.*and no pickled code is run"):
            Cifar("cifar100", tmp_path, True)
    assert not (tmp_path / "ran").exists()


def test_batches_of_the_run(tmp_path):
    """The labels, sizes and classes are the data set's; crops are those of the padded image."""
    lay_out(tmp_path, "cifar10", "binary", "archive in a folder")
    config = DataConfig(name="cifar10", path=str(tmp_path), batch_size=4, workers=0, crop_pct=1.0)
    config.augment.crop_padding = 4
    config.augment.color_jitter = 0.0
    data = build_data(config)
    assert (config.img_size, config.in_chans, config.num_classes) == (32, 3, 10)
    images = np.concatenate([images for images, _ in list(batches("cifar10").values())])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    exact = (torch.from_numpy(images).float() / 255 - mean) / std
    image, label = data.eval[0, 0, 1]
    torch.testing.assert_close(image, exact[21], rtol=1e-5, atol=1e-5)
    assert label == batches("cifar10")["test_batch"][1][1]
    padded = torch.nn.functional.pad((torch.from_numpy(images[3]).float() / 255), (4, 4, 4, 4))
    crops = ((padded - mean) / std).unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    crops = torch.cat([crops, crops.flip(3)])
    seen = set()
    for epoch in range(6):
        image, _ = data.train[epoch, 5, 3]
        distance = (crops - image).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        seen.add(int(distance.argmin()))
    assert len(seen) > 3


def test_a_run_on_cifar(tmp_path, capsys):
    """From the command line: the recipe's model, small, for two steps."""
    path = lay_out(tmp_path, "cifar100", "binary", "archive in a folder")
    model = "model.kwargs={embed_dim: 16, depth: 1, num_heads: 2, drop_path_rate: 0.1}"
    words = ["device=cpu", "steps=2", "data.batch_size=4", "data.workers=0", "precision='no'", model]
    command = ["train", "dhvt", "--recipe", "cifar100", "--data", str(path), f"output={tmp_path / 'run'}", *words]
    assert main(command) == 0, capsys.readouterr().err
    student = load_student(tmp_path / "run/student.safetensors")
    assert student.num_classes == 100 and student.patch_embed.grid_size == (8, 8)
    assert read_config(tmp_path / "run/config.yaml").data.classes == class_names("cifar100")
    for label in reversed(class_names("cifar100")):  # as many classes, but not all of them the same
        (tmp_path / "other" / label.replace("class_7", "kind_7")).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "other" / label.replace("class_7", "kind_7") / "0.png")
    assert main(["eval", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "other")]) == 1
    assert "missing: class_7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"test.bin": None},
            r"does not hold cifar100: expected cifar-100-binary.tar.gz, .* all of train.bin, test.bin",
        ),
        ({"train.bin": b""}, r"train.bin: expected records of 3074 bytes, got 0 bytes"),
        ({"train.bin": bytes(3075)}, r"train.bin: expected records of 3074 bytes, got 3075 bytes"),
        ({"train.bin": b"\x00\xff" + bytes(3072)}, r"expected labels from 0 to 99, got 255"),
    ],
)
def test_bad_binary_files(change, message, tmp_path):
    lay_out(tmp_path, "cifar100", "binary", "unpacked in a folder")
    for name, content in change.items():
        file = tmp_path / "cifar-100-bin" / name
        file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Cifar("cifar100", tmp_path, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a pickled batch with data and fine_labels"),
        (b"\x80\x02}.", "expected a pickled batch with data and fine_labels"),
        (pickle.dumps({b"data": 3, b"fine_labels": [1]}), "expected a pickled batch"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"fine_labels": [1]}, 2), "expected bytes, got"),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}, 2),
            r"\(1,\) int64 labels for \(2",
        ),
        (pickle.dumps({b"data": np.zeros((1, 12), np.uint8), b"fine_labels": [1]}, 2), r"expected a label for each"),
    ],
)
def test_bad_pickled_files(content, message, tmp_path):
    lay_out(tmp_path, "cifar100", "python", "unpacked in a folder")
    (tmp_path / "cifar-100-py/train").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Cifar("cifar100", tmp_path, True)


def test_missing_paths(tmp_path):
    with pytest.raises(DataError, match=r"data.path \(--data\) is needed for cifar10"):
        build_data(DataConfig(name="cifar10"))
    with pytest.raises(DataError, match=r"the data path .* does not exist"):
        build_data(DataConfig(name="cifar10", path=str(tmp_path / "gone")))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"cannot read .*cifar-10-binary.tar.gz"):
        build_data(DataConfig(name="cifar10", path=str(tmp_path)))


def test_padded_crops_are_resized():
    """A crop of the image's own size, black where it was padded, brought to the size of the model."""
    crop, image = PaddedCrop(4, 96, "bilinear"), Image.new("RGB", (32, 32), (255, 255, 255))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        assert crop(image).size == (96, 96)
        torch.manual_seed(seed)
        plain = np.asarray(PaddedCrop(4, 32, "bilinear")(image))[..., 0]
        rows, columns = (np.flatnonzero(plain.max(axis)) for axis in (1, 0))
        assert plain.shape == (32, 32) and min(len(rows), len(columns)) >= 28
        seen.add((int(rows[0]) - 31 + int(rows[-1]), int(columns[0]) - 31 + int(columns[-1])))
    assert len(seen) > 20
