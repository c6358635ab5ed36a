"""PyTorch: the reference implementation, on a CPU or a GPU."""
