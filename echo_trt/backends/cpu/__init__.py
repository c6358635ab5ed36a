"""Compute networks by kernels of our own on a CPU: few rows of tokens against packed weights."""
