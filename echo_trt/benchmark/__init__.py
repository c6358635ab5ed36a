"""Measuring echo-trt, and other engines beside it."""
