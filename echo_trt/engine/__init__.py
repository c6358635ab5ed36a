"""The engine: scheduler, batch, prefix cache, one step of drafting and verifying, sampling, and ``LLM``."""
