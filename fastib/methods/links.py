"""Which attention links there are: the paper's two selections, Algorithm 1 on trained ones, and files of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["TABLE_1", "LinkSelection", "draw_links", "link_mask", "read_mask", "select_links", "write_mask"]

TABLE_1 = {
    "alpha": ((1, 3), (1, 5), (3, 5), (4, 6), (4, 6), (6, 11), (7, 12)),
    "beta": ((1, 2), (1, 5), (3, 5), (4, 6), (4, 7), (6, 10), (7, 10)),
}
"""Per level of EfficientNet-B3 the first and last layer of DeiT-S, from 1, that it is linked to (AAL, Table 1)."""


@dataclass
class LinkSelection:
    """What Algorithm 1 finds.

    strength: (levels, layers), mean of the normalised magnitudes of the links between a level and a layer.
    kept: (levels, layers) bool, those above the threshold.
    mask: (C, M) bool, `kept` for each link.
    """

    strength: Tensor
    kept: Tensor
    mask: Tensor


def select_links(weight: Tensor, levels: Tensor, layers: Tensor, threshold: float = 0.05) -> LinkSelection:
    """Algorithm 1 (AAL, supplement) on magnitudes: min-max normalised over all links, averaged per level and layer.

    On signed weights, as Algorithm 1 is printed, the normalisation would bring weights of zero to the middle.

    weight: (C, M) of trained links, NaN where there is none. levels: (C,) and layers: (M,), int64 from 0: the CNN's
    level of each of its maps, the layer of each attention map. threshold: theta_l; a mean above it is kept.

    Raises ValueError for a threshold outside [0, 1).
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number in [0, 1), got {threshold!r}")
    magnitude = weight.double().abs()
    there = ~magnitude.isnan()
    low, high = magnitude[there].min(), magnitude[there].max()
    magnitude = ((magnitude - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(0.0)
    of_level = torch.nn.functional.one_hot(levels).double()  # (C, levels)
    of_layer = torch.nn.functional.one_hot(layers).double()  # (M, layers)
    count = of_level.T @ there.double() @ of_layer
    strength = of_level.T @ magnitude @ of_layer / count.clamp(min=1)
    kept = strength > threshold
    return LinkSelection(strength, kept, kept[levels][:, layers])


def link_mask(links: str, levels: Tensor, layers: Tensor) -> Tensor | None:
    """(C, M) bool of the links that the option `links` names; None for all.

    links: "full", "alpha" or "beta" (Table 1), or a file of `write_mask`. levels, layers: as for `select_links`.

    Raises ValueError, naming `links`, where they are of another shape, where nothing is kept, or for an unknown name.
    """
    if links == "full":
        return None
    if links in TABLE_1:
        shape = (int(levels.max()) + 1, int(layers.max()) + 1)
        if shape != (7, 12):
            raise ValueError(
                f"links: {links} is for 7 levels of a CNN and 12 layers, but these are {shape[0]} and {shape[1]}; "
                "train with links=full and take the file that `fastib analyze links RUN` writes"
            )
        kept = torch.zeros(shape, dtype=torch.bool)
        for level, (first, last) in enumerate(TABLE_1[links]):
            kept[level, first - 1 : last] = True
        return kept[levels][:, layers]
    mask = read_mask(links)
    if mask.shape != (len(levels), len(layers)):
        raise ValueError(
            f"links: {links} is for {mask.shape[0]} maps of a CNN and {mask.shape[1]} attention maps, "
            f"but these are {len(levels)} and {len(layers)}"
        )
    if not mask.any():
        raise ValueError(f"links: {links} keeps no link at all")
    return mask


def write_mask(path: Path, mask: Tensor) -> None:
    """Write links (C, M) bool as a safetensors file."""
    save_file({"mask": mask.contiguous()}, path)


def read_mask(path: Path | str) -> Tensor:
    """The links of a file of `write_mask`. Raises ValueError naming the option `links`."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"links: expected full, alpha, beta or a .safetensors file, got {str(path)!r}")
    try:
        mask = load_file(path).get("mask")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"links: cannot read {path}: {error}") from error
    if mask is None or mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"links: {path} holds no mask; `fastib analyze links RUN` writes one")
    return mask


def draw_links(selection: LinkSelection, path: Path, title: str) -> None:
    """The heat map of Fig. 2 as a PNG: layers from left to right, levels from bottom to top, kept ones framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    levels, layers = selection.strength.shape
    figure = Figure(figsize=(2.5 + 0.5 * layers, 1.8 + 0.45 * levels), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(selection.strength.numpy(), origin="lower", cmap="viridis", vmin=0.0, aspect="auto")
    for level, layer in selection.kept.nonzero().tolist():
        axis.add_patch(Rectangle((layer - 0.46, level - 0.46), 0.92, 0.92, fill=False, edgecolor="white", lw=1.5))
    axis.set(xlabel="ViT layer", ylabel="CNN level", title=title)
    axis.set_xticks(range(layers), [str(i + 1) for i in range(layers)])
    axis.set_yticks(range(levels), [str(i + 1) for i in range(levels)])
    figure.colorbar(image, label="mean normalised |link|")
    figure.savefig(path, dpi=120)
