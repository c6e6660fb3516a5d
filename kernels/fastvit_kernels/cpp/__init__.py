"""Kernels in C++ for CPUs, compiled on their first use."""
