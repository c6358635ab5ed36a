"""The Triton model: everything it does is in echo_trt.engine.service."""

from echo_trt.adapters.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
