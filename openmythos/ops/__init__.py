"""Numerical kernels: each has a plain reference beside its fast path."""
