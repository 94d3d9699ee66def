"""Names of the machine, its software and the commit, as they go into the results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """The processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """Lower-case letters, digits and single dashes, without the words that every processor carries."""
    name = re.sub(r"\((r|tm|c)\)|@.*?ghz|\b(cpu|processor)\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_slug(device: str) -> str:
    """The stem of the results' files: the GPU's name, or the CPU's with its instruction set and thread count."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return slug(f"{cpu_model()} {capability} {torch.get_num_threads()} threads")


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the checkout, with `+` where tracked files differ from it; empty outside of git."""
    try:
        hashed, changed = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    # The results themselves change while they are being measured.
    return hashed + ("+" if any("benchmarks/results/" not in line for line in changed.splitlines()) else "")


def describe(device: str) -> dict[str, object]:
    """Device, processor, versions and time."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "triton": version("triton"),
        "fastib": version("fastib"),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
