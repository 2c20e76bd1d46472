"""Kernels for CPUs in C++, and the only code that knows about compilers."""
