"""Benchmarks of the operators against every peer that runs here: `pytest benchmarks --benchmark-only`."""
