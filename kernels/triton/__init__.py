"""Triton kernels and their launch functions: no autograd and no registration here."""
