"""Triton kernels for GPUs. Importing a module of this package needs triton."""
