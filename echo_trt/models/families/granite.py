"""Granite 3 and 4.0, dense: Llama's network, with factors on embeddings, scores, residuals and logits.

All of them are folded into what other families have. With x = r * y the residual stream x + r * f(norm(x)) is
y + f(norm(y)), for an epsilon of eps / r ** 2; so r leaves the layers for embeddings and epsilon. The factor on scores
goes into the rotary table, by its root each for query and key; that on logits into the last norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.families.family import Family, count


def _completed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    heads, rope = count(raw, "num_attention_heads", where), raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UserError(f"{where}: rope_type is {kind!r}, but must be 'default'; use another checkpoint.")
    head_dim = raw.get("head_dim") or count(raw, "hidden_size", where) // heads
    scores = _factor(raw, "attention_multiplier", where) * head_dim**0.5
    turned = {"rope_type": "divisors", "divisors": 1.0, "attention_factor": scores**0.5}
    theta = rope.get("rope_theta") or raw.get("rope_theta", 10000.0)
    eps = raw.get("rms_norm_eps", 1e-6) / _factor(raw, "residual_multiplier", where) ** 2
    return {**raw, "rope_theta": theta, "rope_parameters": None, "rope_scaling": turned, "rms_norm_eps": eps}


def _factor(raw: dict[str, Any], key: str, where: str) -> float:
    value = raw.get(key, 1.0)
    if not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r}, not a positive number; take the checkpoint's own config.json.")
    return float(value)


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    embeddings = _factor(raw, "embedding_multiplier", where) / _factor(raw, "residual_multiplier", where)
    return {"embedding_scale": embeddings, "logit_scale": 1 / _factor(raw, "logits_scaling", where)}


def _gguf(field: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    names = {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    usual = config["head_dim"] ** -0.5
    read = {key: field(f"granite.{name}", 1.0) for key, name in names.items()}
    return {**read, "attention_multiplier": field("granite.attention.scale", usual) or usual}


FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    models="Granite 3.0 to 3.3 (2B, 8B); from GGUF also Granite 4.0, dense",
    gguf="granite",
    interleaved=True,
    completed=_completed,
    gguf_options=_gguf,
    options=_options,
)


def _dense(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kinds = {*(raw.get("layer_types") or ["linear_attention"])} - {"attention", "full_attention"}
    if kinds or raw.get("num_local_experts") or raw.get("position_embedding_type") != "rope":
        raise UserError(
            f"{where}: this Granite 4.0 has Mamba layers, experts or no rotary positions; use a dense one, such as "
            "granite-4.0-micro."
        )
    return _completed({**raw, "intermediate_size": raw.get("shared_intermediate_size")}, where)


DENSE = Family(
    name="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    models="Granite 4.0, dense (350M, 1B, micro 3B)",
    completed=_dense,
    options=_options,
    merged={
        "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
        "shared_mlp.output_linear": ("mlp.down_proj",),
    },
)
