"""Modules around the operators, and parts that methods add to models while they train."""

from fastib.nn.aligner import Aligner
from fastib.nn.convert import apply_mhca
from fastib.nn.involution import Involution2d
from fastib.nn.mhca import MHCA

__all__ = ["MHCA", "Aligner", "Involution2d", "apply_mhca"]
