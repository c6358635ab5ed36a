"""Tensor parallelism: one engine over several processes, one for every rank."""
