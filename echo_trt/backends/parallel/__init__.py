"""Tensor parallelism: one process a rank behind a single engine."""
