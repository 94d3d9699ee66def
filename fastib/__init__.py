"""Fused attention, convolution and distillation operators that let vision transformers train well on small data."""

from importlib import import_module as _import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "apply_mhca": "fastib.nn",
    "build_info": "fastib._native",
    "capture_cls_attention": "fastib.nn",
    "models": "fastib.models",
    "nn": "fastib.nn",
    "ops": "fastib.ops",
}

__all__ = ["__version__", "apply_mhca", "backends", "build_info", "capture_cls_attention"]


def backends() -> dict[str, dict[str, bool | str]]:
    """Which backend each operator can use here: ``{op: {backend: True or the reason why not}}``."""
    return _import_module("fastib.ops").backends()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastib' has no attribute {name!r}")
    module = _import_module(_LAZY[name])
    return module if _LAZY[name] == f"fastib.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
