"""The operators in plain PyTorch: oracle of the tests, baseline of the benchmarks, fallback where no kernel runs."""

from fastib.reference.involution import involution_ref
from fastib.reference.mhca_attention import mhca_attention_ref

__all__ = ["involution_ref", "mhca_attention_ref"]
