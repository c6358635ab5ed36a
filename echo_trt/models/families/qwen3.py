"""Qwen3: query and key are normed head by head."""

from __future__ import annotations

from echo_trt.models.families.family import Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    models="Qwen3 (0.6B to 32B)",
    gguf="qwen3",
    options=lambda raw, layers, where: {"qk_norm": True},
    sampling={"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    drafts="EAGLE-3 heads, P-EAGLE, DFlash, DSpark, a smaller model",
    tools="Hermes' JSON in `<tool_call>`",
    thinking="yes, `enable_thinking`",
)
