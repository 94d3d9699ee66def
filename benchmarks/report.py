"""The table and the picture of a results file: `python -m benchmarks.report [FILE ...] [--format text|markdown]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def goal_outcomes(case: dict, cases: dict[str, dict]) -> list[tuple[float, float | None]]:
    """(limit, our median over the fastest of the goal's peers) of each goal; None where a time is missing."""
    outcomes = []
    for goal in case["goals"]:
        other = cases.get(goal["case"], {"peers": {}}) if goal["case"] else case
        theirs = [other["peers"].get(name, {}).get("median_ms") for name in goal["against"]]
        unit = 1.0 if not goal["against"] else min((time for time in theirs if time), default=None)
        ours = case["peers"].get(case["ours"], {}).get("median_ms")
        outcomes.append((goal["limit"], ours / unit if ours and unit else None))
    return outcomes


def goal_text(case: dict, cases: dict[str, dict]) -> list[str]:
    """One line per goal: what is bounded, the value reached, and by how much a goal is missed."""
    lines = []
    for goal, (limit, value) in zip(case["goals"], goal_outcomes(case, cases), strict=True):
        bound = f"at most {limit:g} x {' / '.join(goal['against'])}" if goal["against"] else f"at most {limit:g} ms"
        if goal["case"]:
            bound += f" in {cases[goal['case']]['dtype']}" if goal["case"] in cases else " in a case not measured"
        if value is None:
            verdict = "not measured"
        else:
            verdict = f"{value:.2g}, " + ("met" if value <= limit else f"missed by {value / limit - 1:.0%}")
        lines.append(f"{bound}: {verdict}")
    return lines


def title(case: dict) -> str:
    """The case in words."""
    shape = " ".join(f"{name}={size}" for name, size in case["shape"].items())
    drop = f", rpe_dropout {case['rpe_dropout']:g}" if case.get("rpe_dropout") else ""
    layout = f", {case['layout']}" if case.get("layout", "dense") != "dense" else ""
    kind = "".join(f", {name}" for name in ("masked", "repeated") if case.get(name))
    return f"{case['op']} {case['mode']}, {shape}, {case['dtype']}{drop}{layout}{kind}"


def time_text(milliseconds: float | None) -> str:
    """Three digits, and never an exponent; - where nothing was measured."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def size_text(size: int | None) -> str:
    """Bytes in MiB."""
    return "" if size is None else f"{size / 2**20:.3g}"


def peer_rows(case: dict) -> list[list[str]]:
    """Name, ms, spread, ratio of ours to it, GFLOP/s, shares of the ceilings, MiB, error; or name and reason."""
    ours = case["peers"].get(case["ours"], {}).get("median_ms")
    rows = []
    for name, peer in case["peers"].items():
        if peer["status"] != "ok":
            rows.append([name, peer["status"], "", "", "", "", "", "", peer["reason"]])
            continue
        share = peer.get("shares", {})
        loop = next((value for key, value in share.items() if key.startswith(("fma", "dot"))), None)
        gemm = next((value for key, value in share.items() if key.startswith("gemm")), None)
        parts = loop, gemm, share.get("copy")
        rows.append(
            [
                name,
                time_text(peer["median_ms"]),
                f"{peer['spread']:.0%}",
                f"{ours / peer['median_ms']:.2f}" if ours else "",
                f"{peer['gflops']:.0f}" if "gflops" in peer else "",
                " / ".join("-" if value is None else f"{value:.0%}" for value in parts) if share else "",
                size_text(peer.get("peak_extra_bytes")),
                f"{peer['error']:.0e}" if "error" in peer else "",
                peer["note"],
            ]
        )
    return rows


HEAD = ["peer", "ms", "spread", "ours / it", "GFLOP/s", "of loop / GEMM / copy", "extra MiB", "error", ""]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as columns of text: the first and the last to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def memory_rows(cases: dict[str, dict]) -> list[list[str]]:
    """Peak extra MiB of a training step by length, and how it grows: the exponent of N between the two longest."""
    from math import log

    found = [case for case in cases.values() if case["mode"] == "memory"]
    found.sort(key=lambda case: case["shape"]["N"])
    if not found:
        return []
    names = list(dict.fromkeys(name for case in found for name in case["peers"]))
    rows = [["peer", *(f"N={case['shape']['N']}" for case in found), "grows as"]]
    for name in names:
        sizes = [case["peers"].get(name, {}).get("peak_extra_bytes") for case in found]
        growth = ""
        if len(sizes) > 1 and sizes[-1] and sizes[-2]:
            lengths = found[-1]["shape"]["N"] / found[-2]["shape"]["N"]
            growth = f"N^{log(sizes[-1] / sizes[-2]) / log(lengths):.1f}"
        rows.append([name, *(size_text(size) for size in sizes), growth])
    return rows


def ceiling_text(ceilings: dict) -> str:
    """The ceilings in one line; those that could not be measured with the reason."""
    units = {"copy": "GB/s"}
    return "; ".join(
        f"{name}: {value}" if isinstance(value, str) else f"{name} {value:.4g} {units.get(name, 'GFLOP/s')}"
        for name, value in ceilings.items()
    )


def machine_text(machine: dict) -> str:
    """Device, threads and versions in one line."""
    parts = [str(machine["device"]), f"{machine['cpu_capability']}, {machine['threads']} threads"]
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "python", "commit") if machine.get(name)]
    return ", ".join(parts)


def best_of(case: dict, *names: str) -> float | None:
    """The fastest median of the peers whose name starts with one of these; None where none was measured."""
    times = [
        peer["median_ms"]
        for name, peer in case["peers"].items()
        if name != case["ours"] and name.startswith(names) and peer.get("median_ms")
    ]
    return min(times, default=None)


def markdown(stored: dict) -> str:
    """A short table for a README: a row per case, best of each family of peers, ratio to the fastest of them."""
    families = {
        "eager": ("eager",),
        "SDPA, mask": ("sdpa mask",),
        "SDPA, augmented": ("sdpa augmented",),
        "FlexAttention": ("flex",),
        "SDPA, no bias": ("sdpa no bias",),
    }
    cases = stored["cases"]
    lines = [
        f"{machine_text(stored['machine'])}. Median ms; each column is the faster of the plain and the compiled form.",
        "",
        "| case | fastib | " + " | ".join(families) + " | goal |",
        "|---|" + "---:|" * (len(families) + 1) + "---|",
    ]
    for case in cases.values():
        if case["mode"] not in ("train", "forward"):
            continue
        ours = case["peers"].get(case["ours"], {}).get("median_ms")
        cells = [best_of(case, *names) for names in families.values()]
        goal = "; ".join(
            f"{'-' if ratio is None else f'{ratio:.2f}'} of {limit:g}" for limit, ratio in goal_outcomes(case, cases)
        )
        shown = " | ".join(time_text(cell) for cell in cells)
        lines.append(f"| {title(case)} | **{time_text(ours)}** | {shown} | {goal} |")
    rows = memory_rows(cases)
    if rows:
        lines += ["", "Peak extra MiB of a training step (B=1):", ""]
        lines += [f"| {' | '.join(rows[0])} |", "|---|" + "---:|" * (len(rows[0]) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
    return "\n".join(lines)


def text(stored: dict) -> str:
    """Every case and every peer, with the goals and the reasons."""
    cases = stored["cases"]
    lines = [machine_text(stored["machine"]), ceiling_text(stored["ceilings"])]
    for case in cases.values():
        stale = "" if case["commit"] == stored["machine"]["commit"] else f", measured at {case['commit']}"
        lines += ["", title(case) + stale + (", quick" if case["quick"] else "")]
        lines += [f"  {line}" for line in aligned([HEAD, *peer_rows(case)])]
        lines += [f"  goal: {line}" for line in goal_text(case, cases)]
    rows = memory_rows(cases)
    if rows:
        lines += ["", "peak extra MiB of a training step", *(f"  {line}" for line in aligned(rows))]
    return "\n".join(lines)


def render(path: Path, form: str) -> str:
    """A results file as text or as Markdown."""
    return {"text": text, "markdown": markdown}[form](json.loads(path.read_text()))


def publish(path: Path, form: str = "text") -> str:
    """The table of a results file; writes the Markdown table and the picture beside it, as .md and .png."""
    path.with_suffix(".md").write_text(render(path, "markdown") + "\n")
    try:
        from benchmarks.picture import draw

        picture = f"picture: {draw(path)}"
    except ImportError as error:
        picture = f"no picture: {error}"
    return f"{render(path, form)}\n\n{picture}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and pictures of results.")
    parser.add_argument("files", nargs="*", type=Path, help="results; the newest one of benchmarks/results by default")
    parser.add_argument("--format", choices=("text", "markdown"), default="text")
    options = parser.parse_args(arguments)
    newest = sorted(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)[-1:]
    files = options.files or newest
    if not files:
        parser.error(f"no results in {RESULTS}; run `pytest benchmarks --benchmark-only` first")
    for path in files:
        print(publish(path, options.format))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
