"""Freed memory that stays with the process, so that no training step asks the system for its pages again."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt(3)
_LARGEST = 32 << 20  # bytes up to which glibc lets blocks come from the heap


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed blocks of up to 32 MiB for the next request. Returns whether it took that.

    A step on the CPU frees hundreds of megabytes that the next one asks for again; each page that was given back costs
    a fault and is cleared. It holds for the whole process, which is why the command line does it and no import. False,
    and nothing changed, without glibc, and where the environment sets malloc's options itself.
    """
    if not _glibc() or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))


def _glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # Windows, musl, macOS
        return False
