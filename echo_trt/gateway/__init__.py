"""The OpenAI-compatible gateway: HTTP in OpenAI's format in front of the Triton model ``echo``."""
