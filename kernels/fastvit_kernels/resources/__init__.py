"""The GPU resources that the Triton kernels need, from their machine code; no GPU is needed. See __main__.py."""
