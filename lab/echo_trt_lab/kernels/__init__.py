"""The Triton kernels as compiled for cards, and what they move."""
