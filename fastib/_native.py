"""Finds and loads the compiled library, once. Where it is absent, says why, what that costs and what to do."""

import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_LIBRARY = _HERE / "libfastib.so"
_REPORT = _HERE / "_native_absent.txt"  # written by setup.py where it could not build the library
_REBUILD = "rebuild it: pip install --no-build-isolation -e ."

COST = "CPU operators run the PyTorch reference instead: same numbers, several times slower, N^2 memory"


@functools.cache
def _load() -> str:
    """Loads the library; returns why it is not available, empty where it is."""
    if not _LIBRARY.exists():
        reason = _REPORT.read_text().strip() if _REPORT.exists() else "the package was never built: pip install -e ."
        return f"the compiled library is absent ({reason})"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load ({error.__cause__ or error}); {_REBUILD}"
    return ""


def lib_available() -> bool:
    """Whether the compiled operators can be used."""
    return not _load()


def why_not() -> str:
    """Why the compiled operators cannot be used and what to do; empty where they can."""
    return _load()


@functools.cache
def warn_absent() -> None:
    """Warns, once in a process, that the compiled library is absent."""
    if _load():
        warnings.warn(f"fastib: {_load()}. {COST}.", RuntimeWarning, stacklevel=3)


def build_info() -> dict[str, Any]:
    """Compiler, flags, CUDA architectures, instruction sets compiled, supported and in use; or why there are none."""
    if not lib_available():
        return {"native": why_not()}
    try:
        kernels = importlib.import_module("fastib._kernels")
    except ImportError as error:
        return {"native": True, "python_kernels": f"not built: {error}"}
    return {"native": True, **kernels.build_info()}
