"""Attention with log-sum-exp on CUDA: the choice of kernel."""
