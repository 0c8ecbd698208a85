"""Triton kernels, one file a family; imported lazily by ops.py, on machines that have Triton."""
