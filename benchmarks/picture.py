"""Draws a results file: our time and each peer's, case by case."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from benchmarks.report import title

SHADES = {
    "eager": "#9aa5b1",
    "sdpa mask": "#7aa6c2",
    "sdpa augmented": "#4f86a8",
    "flex": "#b39ddb",
    "sdpa no bias": "#d8b26e",
}


def shade(name: str, ours: str) -> str:
    """Ours stands out; a peer has its family's colour."""
    if name == ours:
        return "#c0392b"
    return next((colour for family, colour in SHADES.items() if name.startswith(family)), "#cccccc")


def draw(path: Path) -> Path:
    """Writes `path` with the ending .png: bars of the median, a whisker from the 20 % to the 80 % quantile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stored = json.loads(path.read_text())
    timed = [case for case in stored["cases"].values() if any("median_ms" in peer for peer in case["peers"].values())]
    columns = 3
    rows = max(1, -(-len(timed) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(6.2 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(timed) :]:
        axis.set_axis_off()
    for axis, case in zip(axes.flat, timed, strict=False):
        peers = {name: peer for name, peer in case["peers"].items() if "median_ms" in peer}
        medians = [peer["median_ms"] for peer in peers.values()]
        whiskers = [
            [peer["median_ms"] - peer["q20_ms"] for peer in peers.values()],
            [peer["q80_ms"] - peer["median_ms"] for peer in peers.values()],
        ]
        bars = axis.barh(list(peers), medians, xerr=whiskers, color=[shade(name, case["ours"]) for name in peers])
        axis.bar_label(bars, [f" {median:.3g}" for median in medians], fontsize=7)
        if max(medians) > 20 * min(medians):
            axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms", fontsize=7)
        axis.set_title(textwrap.fill(title(case), 52), fontsize=8)
    machine = stored["machine"]
    figure.suptitle(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}", fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
