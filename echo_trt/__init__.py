"""echo-trt: ECHO speculative decoding (arXiv 2604.09603) as a compiled deployment pipeline."""

__version__ = "0.1.0"
