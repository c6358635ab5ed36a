"""The Triton model: everything it does is in echo_trt.serving."""

from echo_trt.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
