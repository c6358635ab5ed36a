"""LFM2, dense: gated short convolutions between layers of attention (``models.lfm2``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.families.family import Family, count
from echo_trt.models.hybrid_config import CONV_PAST, UNIT, ShortConvConfig

CONV, FULL = "conv", "full_attention"


def _completed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """State sizes by their usual names, and the width that the MLP has in the end."""
    width = count(raw, "block_ff_dim" if "block_ff_dim" in raw else "intermediate_size", where)
    if raw.get("block_auto_adjust_ff_dim", True):
        width, factor = 2 * width // 3, raw.get("block_ffn_dim_multiplier", 1.0)
        if factor is not None:
            unit = count({"block_multiple_of": 256, **raw}, "block_multiple_of", where)
            width = -(-int(factor * width) // unit) * unit
    usual = {"rope_theta": 1_000_000.0, "rms_norm_eps": raw.get("norm_eps", 1e-5)}
    tied = raw.get("tie_embedding", raw.get("tie_word_embeddings", True))
    return {**usual, **raw, "intermediate_size": width, "tie_word_embeddings": tied}


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    full = raw.get("full_attn_idxs")
    kinds = raw.get("layer_types") or [FULL if full is None or i in full else CONV for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {CONV, FULL} or FULL not in kinds:
        raise UserError(
            f"{where}: layer_types must name {CONV} or {FULL} for each of {layers} layers, the latter at least once; "
            "take the checkpoint's own config.json."
        )
    taps, hidden = count({"conv_L_cache": 3, **raw}, "conv_L_cache", where), count(raw, "hidden_size", where)
    if taps > CONV_PAST + 1:
        raise UserError(f"{where}: conv_L_cache is {taps}, but {CONV_PAST + 1} is the most that is supported.")
    if hidden % UNIT:
        raise UserError(f"{where}: hidden_size is {hidden}, but only multiples of {UNIT} are supported.")
    return {"qk_norm": True, "taps": taps, "recurrent_layers": tuple(i for i, kind in enumerate(kinds) if kind == CONV)}


def _gguf(field: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return further keys of config.json from a GGUF file, where a convolution is a layer without heads of keys."""
    heads = field("lfm2.attention.head_count_kv")
    each = heads if isinstance(heads, list) else [heads] * config["num_hidden_layers"]
    return {
        "layer_types": [FULL if count else CONV for count in each],
        "conv_L_cache": field("lfm2.shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,
    }


FAMILY = Family(
    name="lfm2",
    architecture="Lfm2ForCausalLM",
    models="LFM2 (350M to 2.6B)",
    gguf="lfm2",
    gguf_options=_gguf,
    gguf_values={"conv.conv.weight": lambda taps: taps.unsqueeze(1)},
    completed=_completed,
    fixed={"conv_bias": False},
    options=_options,
    norms={"attention_norm": "operator_norm", "mlp_norm": "ffn_norm"},
    renamed={
        "model.norm.": "model.embedding_norm.",
        "self_attn.o_proj.": "self_attn.out_proj.",
        "self_attn.q_norm.": "self_attn.q_layernorm.",
        "self_attn.k_norm.": "self_attn.k_layernorm.",
        "mlp.gate_proj.": "feed_forward.w1.",
        "mlp.up_proj.": "feed_forward.w3.",
        "mlp.down_proj.": "feed_forward.w2.",
    },
    config=ShortConvConfig,
    drafts="-",
)
