"""From a network to an engine: PyTorch to ONNX once, then one file a compiler."""
