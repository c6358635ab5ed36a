"""Phi-4-mini and Phi-3-mini: Llama's network with merged matrices, and heads of which a part is rotated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.families.family import Family, count

STILL = 1e30  # divides the frequency of what is not rotated; larger: no other angle


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _rotated(raw: dict[str, Any], head_dim: int) -> int:
    share = _rope(raw).get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    return int(head_dim * share)


def _completed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """State frequencies and their factors for each pair of a head's numbers, with the factors of short texts.

    Those of long texts, behind original_max_position_embeddings, would change the keys before: so texts end there.
    """
    rope, heads = _rope(raw), count(raw, "num_attention_heads", where)
    dim = raw.get("head_dim") or count(raw, "hidden_size", where) // heads
    turned, theta = _rotated(raw, dim), rope.get("rope_theta") or raw.get("rope_theta", 10000.0)
    kind, length = rope.get("rope_type", rope.get("type", "default")), count(raw, "max_position_embeddings", where)
    factors, factor = [1.0] * (turned // 2), 1.0
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or count(raw, "original_max_position_embeddings", where)
        factors, ratio = rope.get("short_factor"), rope.get("factor") or length / original
        usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        factor, length = rope.get("attention_factor") or usual, original
        if not isinstance(factors, list) or len(factors) != turned // 2:
            raise UserError(
                f"{where}: short_factor of rope_type longrope is no list of {turned // 2} numbers; take the "
                "checkpoint's own config.json."
            )
    elif kind != "default":
        raise UserError(f"{where}: rope_type is {kind!r}; use a checkpoint with one of default, longrope.")
    still = dim // 2 - turned // 2
    scaling = {
        "rope_type": "divisors",
        # of the frequencies of a head that is rotated as a whole
        "divisors": [each * theta ** (2 * i / turned - 2 * i / dim) for i, each in enumerate(factors)]
        + [STILL] * still,
        "attention_factor": [factor] * len(factors) + [1.0] * still,
    }
    changed = {"rope_theta": theta, "rope_parameters": None, "rope_scaling": scaling}
    return {**raw, **changed, "max_position_embeddings": length}


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    window = raw.get("sliding_window") or 0
    return {"window": window if window < raw["max_position_embeddings"] else 0}


def _gguf(field: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    turned = field("phi3.rope.dimension_count", config["head_dim"])
    window = field("phi3.attention.sliding_window")
    return {"partial_rotary_factor": turned / config["head_dim"], "sliding_window": window}


FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    gguf="phi3",
    gguf_options=_gguf,
    models="Phi-4-mini, Phi-3-mini and -medium (texts of up to 4,096 tokens)",
    completed=_completed,
    options=_options,
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    rotated=_rotated,
)
