"""Llama 2 and 3, SmolLM2 and what else has Llama's network."""

from __future__ import annotations

from echo_trt.models.families.family import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    models="Llama 2, SmolLM2 (135M to 1.7B); Llama 3.1, 3.2, 3.3, DeepSeek-R1-Distill-Llama",
    gguf="llama",
    interleaved=True,
    drafts="EAGLE-3 heads (the default model's is shipped), a smaller model",
    tools="Llama 3's JSON, by the template",
    thinking="DeepSeek-R1-Distill-Llama",
)
