"""Benchmarks of fastib's operators against every peer that runs on this machine: `pytest benchmarks --benchmark-only`."""
