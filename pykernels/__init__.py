"""Triton kernels, one file a stem; imported only when a GPU tensor arrives or a test asks."""
