"""The networks in PyTorch: decoder (Qwen3, Qwen3-MoE, Llama), EAGLE-3 head, and their weights."""
