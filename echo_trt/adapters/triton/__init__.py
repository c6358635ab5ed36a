"""A model of Triton Inference Server."""
