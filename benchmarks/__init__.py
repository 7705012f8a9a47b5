"""Benchmarks, run from a checkout: ``python benchmarks/attention.py``."""
