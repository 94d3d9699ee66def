"""Weakly supervised localization: how well a student's attention finds objects that it was never shown boxes of.

The measure is MaxBoxAcc of Choe et al. 2020, "Evaluating Weakly Supervised Object Localization Methods Right", as in
Table C of AAL: the share of images whose box is found at the score that is best for all of them together. Their code
brings score maps to 8 bits and asks for 1000 thresholds, which makes 255 different ones; all of these are tried here.
One difference is left: of several connected parts theirs takes the one whose outline holds the largest area, ours the
one of most pixels.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor, nn

from fastib.nn import capture_cls_attention
from fastib.train.build import load_student
from fastib.train.config import TrainConfig, read_config
from fastib.train.data import convert
from fastib.train.errors import CheckpointError, ConfigError, DataError
from fastib.train.runs import CONFIG, STUDENT

COLUMNS = ("image", "x0", "y0", "x1", "y1")
IOUS = (0.3, 0.5, 0.7)
THRESHOLDS = np.arange(255)  # a pixel belongs to the object where its score, in 255ths and cut to whole ones, is above
SIZE = 224  # side of the score maps


@dataclass
class Boxes:
    """An image and its objects: path, and boxes (n, 4) as x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""

    path: Path
    boxes: np.ndarray


def localize_run(folder: Path, data: str | None, boxes: str, overlays: int = 0) -> dict:
    """MaxBoxAcc of the averaged attention maps of a finished run's student, in percent, and pictures of some of them.

    Images are scaled to the student's input as a whole, without a crop.

    Args:
        folder: of the run.
        data: folder of the images; None: the run's own.
        boxes: CSV file, one box per line: image (path below `data`), x0, y0, x1, y1 in pixels of the image.
        overlays: how many images to draw into ``overlays/`` below `folder`, with their boxes (green) and the one found
            at the threshold that is best for an IoU of 0.5 (red).

    Raises:
        CheckpointError: the run has no student. DataError: a missing or unreadable image, or boxes that do not fit.
        ConfigError: no folder of images, or a student without attention maps of a class token.
    """
    config = read_config(folder / CONFIG)
    root = data if data is not None else config.data.path
    if root is None or root == "digits":
        raise ConfigError("--localization needs --data, a folder of images")
    if not (folder / STUDENT).is_file():
        raise CheckpointError(f"there is no {folder / STUDENT}: the run has not finished; go on with --resume {folder}")
    samples = read_boxes(Path(boxes), Path(root))
    device = Accelerator(cpu=config.device == "cpu").device
    model = load_student(folder / STUDENT).to(device).eval()
    hits = np.zeros((len(IOUS), len(THRESHOLDS)))
    kept = []
    for first in range(0, len(samples), config.data.eval_batch_size):
        part = samples[first : first + config.data.eval_batch_size]
        images = [open_image(sample, config) for sample in part]
        batch = torch.stack([to_input(image, config) for image in images]).to(device)
        try:
            scores = score_maps(model, batch).cpu().numpy()
        except ValueError as error:
            raise ConfigError(f"the student of {folder} has no attention maps: {error}") from error
        for sample, image, score in zip(part, images, scores, strict=True):
            truth = sample.boxes * (SIZE / np.array([*image.size, *image.size]))
            found = [largest_box(np.uint8(255 * score) > threshold) for threshold in THRESHOLDS]
            best = np.array([max(iou(box, other) for other in truth) for box in found])
            hits += best >= np.array(IOUS)[:, None]
            if len(kept) < overlays:
                kept.append((sample, image, score, found))
    accuracy = 100 * hits / len(samples)
    if kept:
        best = int(accuracy[IOUS.index(0.5)].argmax())
        for sample, image, score, found in kept:
            draw_overlay(sample, image, score, found[best], folder / "overlays", Path(root))
    top = accuracy.max(axis=1).tolist()
    row = {f"IoU {level}": value for level, value in zip(IOUS, top, strict=True)}
    row |= {"mean 0.3, 0.5": sum(top[:2]) / 2, "mean 0.3, 0.5, 0.7": sum(top) / 3}
    row |= {"threshold at 0.5": THRESHOLDS[accuracy[1].argmax()] / 255}
    scores = {"images": len(samples), "MaxBoxAcc": {"averaged attention": row}}
    return scores | ({"overlays": str(folder / "overlays")} if kept else {})


@torch.no_grad()
def score_maps(model: nn.Module, images: Tensor, size: int = SIZE) -> Tensor:
    """Mean of the attention maps of all layers and heads (AAL, Eq. 3), resized and from 0 to 1: (B, size, size)."""
    with capture_cls_attention(model) as captured:
        model(images)
    total, count = torch.zeros(len(images), 1, size, size, device=images.device), 0
    for maps, grid in zip(captured.maps, captured.grids, strict=True):
        mean = maps.float().mean(1).view(-1, 1, *grid)
        total += maps.shape[1] * F.interpolate(mean, (size, size), mode="bicubic", align_corners=False)
        count += maps.shape[1]
    scores = (total / count)[:, 0]
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    return (scores - low) / (high - low).clamp(min=1e-12)


def largest_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around the largest connected part of a bool map; the first pixel alone where there is none."""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return 0, 0, 1, 1
    largest = 1 + np.bincount(parts.ravel())[1:].argmax()
    rows, columns = (np.flatnonzero((parts == largest).any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def iou(a, b) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def read_boxes(path: Path, root: Path) -> list[Boxes]:
    """The images that a CSV file lists, in its order, each with all its boxes. Raises DataError with file and line."""
    if not root.is_dir():
        raise DataError(f"the data path {root} is no folder")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows, names = list(table), table.fieldnames or ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the boxes {path}: {error}") from error
    if not set(COLUMNS) <= set(names):
        raise DataError(f"{path}: expected the columns {','.join(COLUMNS)}, got {','.join(names)}")
    found: dict[str, list] = {}
    for line, row in enumerate(rows, 2):
        try:
            box = [float(row[name]) for name in COLUMNS[1:]]
        except (TypeError, ValueError):
            box = []
        if not box or not (box[0] < box[2] and box[1] < box[3]):
            raise DataError(f"{path}, line {line}: expected numbers with x0 < x1 and y0 < y1")
        found.setdefault(row["image"], []).append(box)
    if not found:
        raise DataError(f"{path} lists no boxes")
    return [Boxes(root / name, np.array(boxes)) for name, boxes in found.items()]


def open_image(sample: Boxes, config: TrainConfig) -> Image.Image:
    """The image in the channels of the run. Raises DataError where it cannot be read or a box is not inside of it."""
    try:
        image = convert(Image.open(sample.path), "RGB" if config.data.in_chans == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {sample.path}: {error}") from error
    if (sample.boxes < 0).any() or (sample.boxes[:, 2:] > np.array(image.size)).any():
        raise DataError(f"a box of {sample.path} is outside of its {image.width} x {image.height} pixels")
    return image


def to_input(image: Image.Image, config: TrainConfig) -> Tensor:
    """The whole image at the size of the student's input, normalised: (C, H, W)."""
    side = config.data.img_size
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    x = torch.from_numpy(pixels.reshape(side, side, -1)).permute(2, 0, 1)
    mean, std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (config.data.mean, config.data.std))
    return (x - mean) / std


def draw_overlay(sample: Boxes, image: Image.Image, score: np.ndarray, found, folder: Path, root: Path) -> None:
    """The attention in colours over the image, its boxes in green and `found` in red, as a PNG in `folder`."""
    from matplotlib import colormaps

    folder.mkdir(exist_ok=True)
    heat = Image.fromarray((255 * colormaps["jet"](score)[..., :3]).astype(np.uint8))
    picture = Image.blend(image.convert("RGB"), heat.resize(image.size, Image.Resampling.BICUBIC), 0.5)
    pen, scale = ImageDraw.Draw(picture), np.array([*image.size, *image.size]) / SIZE
    width = max(1, min(image.size) // 100)
    for box, color in [*((box, (0, 255, 0)) for box in sample.boxes), (np.array(found) * scale, (255, 0, 0))]:
        x0, y0, x1, y1 = (round(float(v)) for v in box)
        pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=color, width=width)
    name = "_".join(Path(os.path.relpath(sample.path, root)).with_suffix("").parts)
    picture.save(folder / f"{name}.png")
