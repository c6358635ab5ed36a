"""The Triton model: requests in, replies out, metrics."""
