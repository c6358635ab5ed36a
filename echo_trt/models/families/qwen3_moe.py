"""Qwen3's mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from echo_trt.models.families.family import Family, count


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    step = count({"decoder_sparse_step": 1, **raw}, "decoder_sparse_step", where)
    dense = {*(raw.get("mlp_only_layers") or ()), *(i for i in range(layers) if (i + 1) % step)}
    return {
        "qk_norm": True,
        # transformers 5 writes num_local_experts, earlier versions num_experts.
        "num_experts": count(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts", where),
        "experts_per_token": count(raw, "num_experts_per_tok", where),
        "expert_size": count(raw, "moe_intermediate_size", where),
        "norm_expert_weights": bool(raw.get("norm_topk_prob", False)),
        "dense_layers": tuple(sorted(dense)),
    }


def _gguf_options(field: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    """Read the experts' sizes; llama.cpp divides the chosen experts' weights by their sum in every file."""
    keys = {"num_experts": "count", "num_experts_per_tok": "used_count", "moe_intermediate_size": "feed_forward_length"}
    return {"norm_topk_prob": True} | {name: field(f"qwen3moe.expert_{key}") for name, key in keys.items()}


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    gguf="qwen3moe",
    gguf_options=_gguf_options,
    models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B",
    options=_options,
    drafts="EAGLE-3 heads, a smaller model",
    tools="Hermes' JSON in `<tool_call>`; Coder's tags",
    thinking="yes, `enable_thinking`; Coder no",
)
