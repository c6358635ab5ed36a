"""Benchmarks of echo-trt, and of other engines beside it."""
