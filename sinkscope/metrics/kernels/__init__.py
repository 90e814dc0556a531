"""Triton kernels for CUDA that compute the definitions in one pass; imported when needed."""
