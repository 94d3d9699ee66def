"""The operators: fused where this machine can, in plain PyTorch where it cannot."""

from fastib.ops._backend import backends
from fastib.ops.involution import involution
from fastib.ops.mhca_attention import mhca_attention

__all__ = ["backends", "involution", "mhca_attention"]
