"""Training methods. Importing this package registers every module of it that defines a method."""

import importlib
import pkgutil

from fastib.methods.base import Method, MethodOptions, get_method, list_methods, register_method

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "MethodOptions", "get_method", "list_methods", "register_method"]
