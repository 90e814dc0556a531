"""Triton kernels for CUDA that give the definitions' numbers in one pass; imported when needed."""
