"""TensorRT and TensorRT-RTX: build, check and run engines."""
