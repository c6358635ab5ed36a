"""TensorRT: build, check and run engines."""
