"""Splits, batches and augmentation: which images, in which order, whoever reads them; and what bad folders say."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.dataset import IterableImageDataset

from fastib.train.config import AugmentConfig, DataConfig
from fastib.train.data import Data, build_data, convert
from fastib.train.digits import MEAN, STD, affine
from fastib.train.errors import ConfigError, DataError
from fastib.train.sampling import EvalBatches, Stream, TrainBatches


@pytest.fixture
def folder(tmp_path):
    """Three classes of 6, 8 and 10 noise images of 20 x 24 pixels."""
    rng = np.random.default_rng(0)
    for label, count in (("ant", 6), ("bee", 8), ("cat", 10)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i:02d}.png")
    return tmp_path / "images"


def config(path=None, **options) -> DataConfig:
    name = {"name": "folder", "path": str(path), "img_size": 16, "batch_size": 4, "workers": 0} if path else {}
    return DataConfig(**(name | options))


def keys(sampler):
    return [key for batch in sampler for key in batch]


def test_the_digits_are_split_once_and_for_all_by_class():
    data = build_data(config())
    assert (len(data.train), len(data.eval)) == (1437, 360)
    pixels = load_digits().images.reshape(1797, -1) / 16
    both = torch.cat([data.train.images, data.eval.images]).flatten(1).double().numpy()
    assert sorted(map(tuple, both)) == sorted(map(tuple, pixels))
    assert np.bincount(data.eval.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    again = build_data(config(), seed=5)
    assert data.eval.images.equal(again.eval.images)


def test_a_fraction_of_the_digits_is_stratified_and_of_the_training_part():
    whole, part = build_data(config()), build_data(config(train_fraction=0.1))
    assert len(part.train) == 143
    counts, expected = np.bincount(part.train.labels), np.bincount(whole.train.labels) * 143 / 1437
    assert abs(counts - expected).max() < 1
    known = set(map(tuple, whole.train.images.flatten(1).tolist()))
    assert all(tuple(image) in known for image in part.train.images.flatten(1).tolist())
    with pytest.raises(DataError, match=r"stratified fraction 0\.001 of 1437 images"):
        build_data(config(train_fraction=0.001))


def test_evaluation_digits_are_the_images_themselves_normalised():
    data = build_data(config(in_chans=3)).eval
    images, labels = data.__getitems__([(0, i, i) for i in (3, 7)])
    torch.testing.assert_close(images, ((data.images[[3, 7]] - MEAN) / STD).expand(2, 3, 8, 8), atol=1e-5, rtol=0)
    assert labels.equal(data.labels[[3, 7]])


def test_digits_are_shifted_rotated_and_zoomed_as_told():
    draws = torch.tensor([[0.5, -1.0, 0.25, -0.5]], dtype=torch.float64)
    theta = affine(draws, degrees=60, translate=0.1, zoom=0.2)[0]
    cos, sin = 3**0.5 / 2 / 0.8, 0.5 / 0.8  # 30 degrees, at 0.8 of the size; shifts in units of half the image
    torch.testing.assert_close(theta, torch.tensor([[cos, -sin, 0.05], [sin, cos, -0.1]], dtype=torch.float64))


def test_augmentation_depends_on_seed_epoch_and_position_alone():
    data = build_data(config(), seed=1).train
    one = data.__getitems__([(2, 5, 9), (2, 6, 4)])[0]
    torch.randn(10)
    assert one.equal(build_data(config(), seed=1).train.__getitems__([(2, 5, 9), (2, 6, 4)])[0])
    assert one[1].equal(data[(2, 6, 4)][0])
    for other in (data[(3, 6, 4)][0], data[(2, 7, 4)][0], build_data(config(), seed=2).train[(2, 6, 4)][0]):
        assert not one[1].equal(other)


def test_an_epoch_is_a_permutation_and_each_epoch_another():
    batches = TrainBatches(50, 10, seed=3, stop=10)
    first, second = keys(batches)[:50], keys(batches)[50:]
    assert sorted(index for *_, index in first) == sorted(index for *_, index in second) == list(range(50))
    assert [p for _, p, _ in first] == list(range(50))
    assert {e for e, *_ in first} == {0}
    assert {e for e, *_ in second} == {1}
    assert [i for *_, i in first] != [i for *_, i in second]


@pytest.mark.parametrize("start", [0, 3, 7])
def test_processes_and_micro_batches_cut_the_same_steps(start):
    whole = list(TrainBatches(53, 12, seed=3, start=start, stop=9))
    parts = [list(TrainBatches(53, 12, seed=3, start=start, stop=9, accumulate=2, rank=r, world=3)) for r in range(3)]
    assert whole == list(TrainBatches(53, 12, seed=3, stop=9))[start:]
    for step, batch in enumerate(whole):
        pieces = [parts[r][2 * step + micro] for micro in range(2) for r in range(3)]
        assert [key for piece in pieces for key in piece] == batch
    assert len(parts[0]) == len(TrainBatches(53, 12, seed=3, start=start, stop=9, accumulate=2, world=3))


def test_repeated_augmentation_repeats_images_at_other_positions():
    order = keys(TrainBatches(30, 30, seed=3, stop=1, repeats=3))
    assert len({index for *_, index in order}) == 10
    assert all(order[i][2] == order[i + 1][2] == order[i + 2][2] for i in range(0, 30, 3))
    assert len({position for _, position, _ in order}) == 30


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="batch_size=64 is more than the 50 training images"):
        TrainBatches(50, 64, seed=0, stop=1)
    with pytest.raises(ConfigError, match="batch_size=10 does not split into grad_accum=2 x 3 processes"):
        TrainBatches(50, 10, seed=0, stop=1, accumulate=2, world=3)


@pytest.mark.parametrize(("size", "world", "batch"), [(10, 1, 4), (10, 3, 2), (7, 4, 2), (3, 4, 2)])
def test_every_evaluation_image_counts_once(size, world, batch):
    samplers = [EvalBatches(size, batch, rank=r, world=world) for r in range(world)]
    counted = [[i for *_, i in keys(s)][: s.valid] for s in samplers]
    assert sorted(itertools.chain(*counted)) == list(range(size))
    assert len({len(list(s)) for s in samplers}) == 1
    assert all(len(s) == len(list(s)) for s in samplers)


def test_a_folder_without_splits_is_split_by_class(folder):
    data = build_data(config(folder, eval_fraction=0.5))
    labels = [[data.train.dataset.reader.samples[i][1] for i in part.indices] for part in (data.train, data.eval)]
    assert np.bincount(labels[0]).tolist() == np.bincount(labels[1]).tolist() == [3, 4, 5]
    assert not set(data.train.indices) & set(data.eval.indices)


def test_a_folder_with_splits_uses_them(folder, tmp_path):
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train").symlink_to(folder)
    (tmp_path / "both" / "val").symlink_to(folder)
    data = build_data(config(tmp_path / "both"))
    assert len(data.train) == len(data.eval) == 24
    (tmp_path / "other" / "val" / "ant").mkdir(parents=True)
    (tmp_path / "other" / "val" / "dog").mkdir(parents=True)
    (tmp_path / "other" / "train").symlink_to(folder)
    for label in ("ant", "dog"):
        (tmp_path / "other" / "val" / label / "0.png").write_bytes((folder / "ant" / "00.png").read_bytes())
    with pytest.raises(DataError, match="differ in these classes: bee, cat, dog"):
        build_data(config(tmp_path / "other"))


def test_batches_are_the_same_from_any_number_of_workers_and_from_the_middle(folder):
    def batches(workers, start):
        c = config(folder, workers=workers)
        c.augment.reprob, c.augment.auto_augment = 0.5, "rand-m9-mstd0.5-inc1"
        return list(build_data(c, seed=4).train_loader(c, 4, start=start, stop=9))

    plain = batches(0, 0)
    assert len(plain) == 9
    for workers, start in ((2, 0), (2, 5), (0, 5)):
        for (images, labels), (other, others) in zip(plain[start:], batches(workers, start), strict=True):
            assert images.equal(other)
            assert labels.equal(others)


def test_torchvision_data_sets_are_read_through_timm(folder):
    data = build_data(config(folder, name="torch/image_folder"))
    images, labels = next(iter(data.eval_loader(config(folder))[0]))
    ours = build_data(config(folder, eval_fraction=0.5)).eval
    assert images.shape == (24, 3, 16, 16)
    assert labels.tolist() == [0] * 6 + [1] * 8 + [2] * 10
    index = int(ours.indices[0])
    assert images[index].equal(ours[(0, 0, 0)][0])


class Reader:
    """Twenty grey images in the order of the epoch, as timm's sequential readers give them."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 20

    def __iter__(self):
        for i in torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            yield Image.new("RGB", (8, 8), (10 * i,) * 3), i


def test_streams_go_on_where_they_stopped():
    def noisy(image):
        return torch.tensor(image.getpixel((0, 0))).float() + torch.rand(3)

    def batches(start):
        data = Data(Stream(IterableImageDataset("", reader=Reader()), noisy, seed=1, training=True), None)
        assert data.steps_per_epoch(5) == 4
        loader = data.train_loader(DataConfig(batch_size=6, workers=0), 1, start=start, stop=0, accumulate=2)
        return [next(loader) for _ in range(8)]

    whole = batches(0)
    assert sorted(torch.cat([labels for _, labels in whole])[:20].tolist()) == list(range(20))
    for (images, labels), (others, other_labels) in zip(whole[4:], batches(2), strict=False):
        assert images.equal(others)
        assert labels.equal(other_labels)


def test_missing_and_malformed_folders_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"the data path .*nowhere does not exist"):
        build_data(config(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"data\.path \(--data\) is needed"):
        build_data(DataConfig(name="folder"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing holds no images: expected one folder of images per class"):
        build_data(config(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"ant holds 1 class\(es\)"):
        build_data(config(folder / "ant"))
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match=r"the class folder .*images/dog holds no images"):
        build_data(config(folder))
    (folder / "dog").rmdir()
    with pytest.raises(DataError, match=r"num_classes=5, but .*images has 3 classes"):
        build_data(config(folder, num_classes=5))
    with pytest.raises(DataError, match=r"num_classes=9, but the digits has 10"):
        build_data(config(num_classes=9))
    with pytest.raises(DataError, match=r"data\.in_chans must be 1 or 3, got 2"):
        build_data(config(in_chans=2))
    with pytest.raises(DataError, match=r"data\.augment\.auto_augment=mars: Unknown AA policy mars$"):
        build_data(config(folder, augment=AugmentConfig(auto_augment="mars")))
    with pytest.raises(DataError, match="cannot open the data set torch/nonsense"):
        build_data(config(folder, name="torch/nonsense"))


def test_classes_are_those_that_the_run_knows_in_the_same_order(folder):
    known = config(folder)
    build_data(known)
    assert (known.classes, known.num_classes) == (["ant", "bee", "cat"], 3)
    build_data(known)
    wrong = "the classes of .*images are not those of the run .data.classes.: "
    with pytest.raises(DataError, match=f"{wrong}missing: dog; unknown: ant, cat$"):
        build_data(config(folder, classes=["bee", "dog"]))
    with pytest.raises(DataError, match=f"{wrong}missing: dog$"):
        build_data(config(folder, classes=["ant", "bee", "cat", "dog"]))
    with pytest.raises(DataError, match=f"{wrong}unknown: cat$"):
        build_data(config(folder, classes=["ant", "bee"]))
    with pytest.raises(DataError, match=f"{wrong}the same in another order: ant, bee, cat; expected: bee, ant, cat$"):
        build_data(config(folder, classes=["bee", "ant", "cat"]))
    for i in range(9):
        (folder / "cat").rename(folder / "cat 0") if i == 0 else (folder / f"cat {i}").mkdir()
        (folder / f"cat {i}" / "0.png").write_bytes((folder / "ant" / "00.png").read_bytes())
    unknown = ", ".join(["ant", "bee", *(f"cat {i}" for i in range(8))])
    with pytest.raises(DataError, match=f"{wrong}missing: cat; unknown: {unknown} and 1 more$"):
        build_data(config(folder, classes=["cat"]))
    digits = config()
    build_data(digits)
    assert digits.classes == list("0123456789")


@pytest.mark.parametrize("content", [b"no image at all", b"truncated"])
def test_an_unreadable_image_is_named_and_never_stepped_over(folder, content):
    bad = folder / "bee" / "03.png"
    bad.write_bytes(bad.read_bytes()[:200] if content == b"truncated" else content)
    data = build_data(config(folder))
    with pytest.raises(DataError, match=r"cannot read the image .*bee/03\.png"):
        for part in (data.train, data.eval):
            for i in range(len(part)):
                part[(0, i, i)]


def test_a_split_that_is_missing_is_no_reason_to_test_on_training_images(folder, tmp_path):
    for name, split in (("train", "eval_split=validation"), ("val", "train_split=train")):
        root = tmp_path / f"only-{name}"
        root.mkdir()
        (root / name).symlink_to(folder)
        with pytest.raises(DataError, match=rf"has the folder {name}, but none for data\.{split}: name it, or set"):
            build_data(config(root))
    root = tmp_path / "only-train"
    data = build_data(config(root, eval_split="train", eval_fraction=0.25))
    assert (len(data.train), len(data.eval)) == (18, 6)
    (root / "test").symlink_to(folder)
    with pytest.raises(DataError, match=r"has the folder train, but none for data\.eval_split=validation"):
        build_data(config(root))
    assert build_data(config(root, eval_split="test")).eval.dataset.reader.root == str(root / "test")


def test_images_outside_of_the_class_folders_are_no_class(folder):
    for i in range(2):
        (folder / f"{i}.png").write_bytes((folder / "ant" / "00.png").read_bytes())
    with pytest.raises(DataError, match="images holds images outside of the folders of its classes"):
        build_data(config(folder))


def test_unknown_names_of_data_sets_are_refused(folder):
    with pytest.raises(DataError, match=r"data\.name: expected digits, folder, cifar10, cifar100 or .*'imagenet'"):
        build_data(config(folder, name="imagenet"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_keep_the_upper_eight(mode):
    pixels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    ours = np.asarray(convert(Image.fromarray(pixels), mode))
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (ours == (expected[..., None] if mode == "RGB" else expected)).all()
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got PIL's mode F"):
        convert(Image.fromarray(np.zeros((2, 2), np.float32)), mode)


def test_an_image_that_pil_finds_too_large_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = build_data(config(folder))
    with pytest.raises(DataError, match=r"cannot read the image .*/ant/00\.png: Image size \(480 pixels\) exceeds"):
        data.eval.read(0)


def test_an_epoch_without_a_whole_batch_is_refused_at_once(folder):
    data = build_data(config(folder, eval_fraction=0.5))
    assert data.steps_per_epoch(5) == 2
    with pytest.raises(ConfigError, match=r"data\.batch_size=13 is more than the 12 training images"):
        data.steps_per_epoch(13)
