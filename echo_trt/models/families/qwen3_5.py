"""Qwen3.5, dense: three gated delta-net layers to one layer of gated attention (``models.qwen3_5``)."""

from __future__ import annotations

from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.families.family import Family, count
from echo_trt.models.hybrid_config import HybridConfig

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
        sizes[f"linear_{kind}_dim"] = count(raw, f"linear_{kind}_head_dim", where)
    return {
        "qk_norm": True,
        "norm_offset": 1.0,
        "linear_layers": tuple(i for i, kind in enumerate(kinds) if kind == LINEAR),
        "rotary_dim": int(count(raw, "head_dim", where) * share),
        **sizes,
    }


FAMILY = Family(
    name="qwen3_5",
    architecture="Qwen3_5ForCausalLM",
    models="Qwen3.5 (0.8B to 27B), the text of Qwen3_5ForConditionalGeneration",
    fixed={"linear_conv_kernel_dim": 4, "attn_output_gate": True},
    options=_options,
    config=HybridConfig,
    drafts="the checkpoint's MTP head",
    tools="as text",
    thinking="yes, `enable_thinking`",
)
