"""The kernels compiled for GPUs that are not here, and their machine code read."""
