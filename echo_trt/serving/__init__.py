"""Serving: one engine loop for all requests, behind Triton Inference Server."""
