"""Gemma 3's models of text: most layers have a window and a rotary base of their own, and norms surround all parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from echo_trt.errors import UserError, described
from echo_trt.models.families.family import Family, count


def _completed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return config.json with what it leaves out, and with the rotary base of layers without a window as the one."""
    from transformers import Gemma3TextConfig  # takes a second

    try:
        whole = Gemma3TextConfig(**raw).to_dict()
    except Exception as error:  # of its checks
        raise UserError(f"{where}: {described(error)}; take the checkpoint's own config.json.") from error
    ropes = whole["rope_parameters"]
    local = ropes["sliding_attention"]["rope_theta"]
    return {**raw, **whole, "rope_parameters": ropes["full_attention"], "rope_local_base_freq": local}


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    kinds = enumerate(raw["layer_types"])
    return {
        "qk_norm": True,
        "window": count(raw, "sliding_window", where),
        "full_layers": tuple(i for i, kind in kinds if kind == "full_attention"),
        "local_rope_theta": float(raw["rope_local_base_freq"]),
        "gelu": True,
        "post_norms": True,
        "norm_offset": raw.get("norm_offset", 1.0),
        "query_scale": (raw["head_dim"] / raw["query_pre_attn_scalar"]) ** 0.5,
        "embedding_scale": raw["hidden_size"] ** 0.5,
    }


def _gguf(field: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return further keys of config.json from a GGUF file: its norms are whole, and the 27B's queries are scaled."""
    is_27b = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {
        "sliding_window": field("gemma3.attention.sliding_window"),
        "rope_local_base_freq": field("gemma3.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": scalar,
        "norm_offset": 0.0,
    }


FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    models="Gemma 3 (270M to 27B; 4B and more from GGUF)",
    gguf="gemma3",
    completed=_completed,
    gguf_options=_gguf,
    fixed={
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    options=_options,
    norms={
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    end_of_turn="<end_of_turn>",
    sampling={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
)
