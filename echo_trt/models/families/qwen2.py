"""Qwen2 and Qwen2.5: query, key and value have a bias."""

from __future__ import annotations

from echo_trt.models.families.family import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5 (0.5B to 72B), QwQ 32B, DeepSeek-R1-Distill-Qwen",
    gguf="qwen2",
    options=lambda raw, layers, where: {"attention_bias": True},
    tools="Hermes' JSON in `<tool_call>`",
    thinking="QwQ, DeepSeek-R1-Distill-Qwen",
)
