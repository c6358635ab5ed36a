"""Mistral's dense models of text: Llama's network, with heads of a size of their own and, in v0.1, a sliding window."""

from __future__ import annotations

from typing import Any

from echo_trt.models.families.family import Family, count


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    return {"window": count(raw, "sliding_window", where) if raw.get("sliding_window") is not None else 0}


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    models="Mistral 7B, Nemo 12B, Small 24B (2501), Ministral 8B",
    gguf="llama",
    interleaved=True,
    options=_options,
    tools="Mistral's, behind `[TOOL_CALLS]`",
)
