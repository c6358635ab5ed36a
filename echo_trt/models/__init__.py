"""The networks in PyTorch: decoders of several families, EAGLE-3 head, and their weights."""
