"""Qwen3.5, dense: three gated delta-net layers to one layer of gated attention (``models.qwen3_5``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.families.family import Family, count
from echo_trt.models.hybrid_config import UNIT, HybridConfig

LINEAR, FULL = "linear_attention", "full_attention"


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    kinds = raw.get("layer_types") or [FULL if i % 4 == 3 else LINEAR for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {LINEAR, FULL} or FULL not in kinds:
        raise UserError(
            f"{where}: layer_types must name {LINEAR} or {FULL} for each of {layers} layers, the latter at least once; "
            "take the checkpoint's own config.json."
        )
    rope = raw.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 0.25
    sizes: dict[str, int] = {}
    for kind in ("key", "value"):
        sizes[f"linear_{kind}_heads"] = count(raw, f"linear_num_{kind}_heads", where)
        sizes[f"linear_{kind}_dim"] = size = count(raw, key := f"linear_{kind}_head_dim", where)
        if size % UNIT:
            raise UserError(f"{where}: {key} is {size}, but only multiples of {UNIT} are supported.")
    keys, values = sizes["linear_key_heads"], sizes["linear_value_heads"]
    if values % keys:
        raise UserError(
            f"{where}: linear_num_value_heads is {values}, no multiple of linear_num_key_heads {keys}; take the "
            "checkpoint's own config.json."
        )
    return {
        "qk_norm": True,
        "norm_offset": raw.get("norm_offset", 1.0),
        "tiled_heads": raw.get("tiled_heads", False),
        "recurrent_layers": tuple(i for i, kind in enumerate(kinds) if kind == LINEAR),
        "rotary_dim": int(count(raw, "head_dim", where) * share),
        **sizes,
    }


def _gguf(field: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return further keys of config.json from a GGUF file: its norms are whole, and its heads of values are tiled."""
    layers, heads = range(config["num_hidden_layers"]), field("qwen35.ssm.time_step_rank")
    interval = field("qwen35.full_attention_interval", 4)
    return {
        "layer_types": [LINEAR if (i + 1) % interval else FULL for i in layers],
        "partial_rotary_factor": field("qwen35.rope.dimension_count", 64) / config["head_dim"],
        "linear_num_key_heads": field("qwen35.ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": field("qwen35.ssm.state_size"),
        "linear_value_head_dim": field("qwen35.ssm.inner_size", 0) // (heads or 1),
        "linear_conv_kernel_dim": field("qwen35.ssm.conv_kernel"),
        "mtp_num_hidden_layers": field("qwen35.nextn_predict_layers", 0),
        "norm_offset": 0.0,
        "tiled_heads": True,
    }


FAMILY = Family(
    name="qwen3_5",
    architecture="Qwen3_5ForCausalLM",
    models="Qwen3.5 (0.8B to 27B), the text of Qwen3_5ForConditionalGeneration",
    gguf="qwen35",
    gguf_options=_gguf,
    gguf_values={"linear_attn.A_log": lambda values: (-values).log(), "conv1d.weight": lambda taps: taps.unsqueeze(1)},
    fixed={"linear_conv_kernel_dim": 4, "attn_output_gate": True},
    options=_options,
    config=HybridConfig,
    drafts="the checkpoint's MTP head",
    tools="as text",
    thinking="yes, `enable_thinking`",
)
