"""Hosts other than our server: Triton Inference Server and NVIDIA Dynamo."""
