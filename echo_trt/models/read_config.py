"""Reading of a network's sizes and switches from its checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig, Eagle3Config
from echo_trt.models.families import family_of
from echo_trt.models.families.family import count

#: Switches that change the arithmetic, with the one value that these networks implement.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}

#: Keys that a kind of rotary scaling must state, and further keys that it may state.
ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "divisors": ("divisors",),  # of GGUF files: one for each inverse frequency
}
#: Keys that a family reads, and that concern images alone: a text has one position in all their sections.
ROPE_OTHERS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
ROPE_OPTIONAL = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
#: Key that names layers -> our id less theirs: ours is of the layer whose input is read, DFlash's of that whose output.
LAYER_KEYS = {"target_layer_ids": 1, "aux_hidden_state_layer_ids": 0}


def decoder_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Read a Hugging Face ``config.json``. ``where`` names the file in errors."""
    raw = text_config(raw)
    family = family_of((raw.get("architectures") or ["none"])[0], where)
    raw = family.completed(raw, where)
    shape = _shape(raw, where, family.fixed)
    eos = raw.get("eos_token_id")
    return family.config(
        family=family.name,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        **shape,
        **family.options(raw, shape["num_layers"], where),
    )


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the network of text where a checkpoint also reads images (Qwen3.5), else ``raw``."""
    nested = raw.get("text_config")
    if nested is None or raw.get("architectures") != ["Qwen3_5ForConditionalGeneration"]:
        return raw
    return {"tie_word_embeddings": raw.get("tie_word_embeddings"), **nested, "architectures": ["Qwen3_5ForCausalLM"]}


def check_context(config: DecoderConfig, context: int) -> None:
    """Refuse a recipe's context in which the target would have more positions than it knows."""
    if context > config.max_position:
        raise UserError(
            f"limits.context is {context}, but the target knows {config.max_position} positions; lower it in the "
            "recipe."
        )


def rank_config(config: DecoderConfig, ranks: int) -> DecoderConfig:
    """Return the sizes of one rank's part. With fewer KV heads than ranks, neighbouring ranks hold the same head."""
    check_division(config, ranks)
    if ranks == 1:
        return config
    return replace(
        config,
        ranks=ranks,
        num_heads=config.num_heads // ranks,
        num_kv_heads=max(config.num_kv_heads // ranks, 1),
        intermediate_size=config.intermediate_size // ranks,
        expert_size=config.expert_size // ranks,
        tie_embeddings=False,  # the table is whole, the output matrix is not
    )


def check_division(config: DecoderConfig, ranks: int) -> None:
    """Refuse a number of ranks that the target cannot be divided among."""
    has_dense = any(not config.has_experts(layer) for layer in range(config.num_layers))
    sizes = [("attention heads", config.num_heads)]
    sizes += [("intermediate_size", config.intermediate_size)] if has_dense else []
    sizes += [("moe_intermediate_size", config.expert_size)] if config.num_experts else []
    for name, value in sizes:
        if value % ranks:
            raise UserError(f"tensor_parallel is {ranks}, which does not divide the target's {value} {name}; lower it.")
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        raise UserError(
            f"tensor_parallel is {ranks}, which neither divides the target's {config.num_kv_heads} KV heads nor is a "
            "multiple of them; lower it."
        )


def check_fits(config: Eagle3Config, target: DecoderConfig, where: str) -> None:
    """Refuse a head or a block drafter of another target."""
    for key, own, theirs in (
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
        ("num_target_layers", config.target_layers or target.num_layers, target.num_layers),
    ):
        if own != theirs:
            raise UserError(
                f"{where}: {key} is {own}, but the target's is {theirs}; use a drafter trained for this target."
            )
    layers = config.feature_layers
    if layers and not 0 <= min(layers) <= max(layers) < target.num_layers:
        ids = [layer - LAYER_KEYS.get(config.layer_key, 0) for layer in layers]
        raise UserError(
            f"{where}: {config.layer_key} names {ids}, but this target has {target.num_layers} layers whose inputs can "
            "be read; use a drafter trained for this target."
        )


def is_eagle3(raw: dict[str, Any]) -> bool:
    """Tell whether a ``config.json`` is an EAGLE-3 head's, in any of the published spellings."""
    kind, architecture = raw.get("speculators_model_type"), str((raw.get("architectures") or [""])[0])
    return kind == "eagle3" if kind else "eagle3" in architecture.lower()


def eagle3_config(raw: dict[str, Any], where: str) -> Eagle3Config:
    """Read an EAGLE-3 head's ``config.json``, in any of the published spellings."""
    # The speculators library nests the layer's configuration, and norms before the residual by default.
    nested = raw.get("transformer_layer_config") or {}
    raw = {"norm_before_residual": bool(nested), **nested, **raw}
    architecture = (raw.get("architectures") or ["none"])[0]
    if "eagle3" not in architecture.lower():
        raise UserError(f"{where}: architectures is {architecture!r}, not an EAGLE-3 head (LlamaForCausalLMEagle3).")
    if raw.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{where}: num_hidden_layers is {raw['num_hidden_layers']}, but an EAGLE-3 head has 1.")
    eagle = raw.get("eagle_config") or {}
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError(f"{where}: use_aux_hidden_state is false, but EAGLE-3 reads three layers; use such a head.")
    for key in ("norm_before_fc", "eh_proj_before_attn", "return_hidden_post_norm"):
        if raw.get(key) or eagle.get(key):
            raise UserError(f"{where}: {key} is true, which is not supported; use a head without it.")
    shape = _head_shape(raw, where)
    del shape["num_layers"]
    return Eagle3Config(
        **shape, norm_output=bool(raw.get("norm_output")), feature_layers=_feature_layers(raw, eagle, where)
    )


def _head_shape(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Read the sizes and switches that EAGLE-3 heads and block drafters share."""
    shape = _shape({"num_hidden_layers": 1, **raw}, where)
    sized = {"draft_vocab_size": raw.get("draft_vocab_size") or shape["vocab_size"]}
    return {
        **shape,
        "draft_vocab_size": count(sized, "draft_vocab_size", where),
        "target_hidden_size": raw.get("target_hidden_size") or shape["hidden_size"],
        "target_layers": raw.get("num_target_layers") or 0,
        "target_sha256": raw.get("target_sha256", ""),
        "fc_norm": bool(raw.get("fc_norm")),
        "norm_before_residual": bool(raw.get("norm_before_residual")),
    }


def _feature_layers(raw: dict[str, Any], eagle: dict[str, Any], where: str) -> tuple[int, ...]:
    """Return the target's layers whose inputs the head reads, where its configuration names them.

    The key has two meanings. Within ``eagle_config`` (SpecForge, ModelOpt, SGLang) it lists layers whose outputs are
    read; at the top level (vLLM, speculators) it lists layers whose inputs are read.
    """
    key = "eagle_aux_hidden_state_layer_ids"
    layers = [layer + 1 for layer in eagle.get(key) or ()] or list(raw.get(key) or ())
    if layers and len(layers) != 3:
        raise UserError(f"{where}: {key} names {len(layers)} layers, but an EAGLE-3 head reads 3; use such a head.")
    return tuple(layers)


def _shape(raw: dict[str, Any], where: str, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    for key, needed in {**FIXED, **(fixed or {})}.items():
        if raw.get(key, needed) not in (None, needed):
            raise UserError(f"{where}: {key} is {raw[key]!r}, but must be {needed!r}; use another checkpoint.")
    raw = {key: value for key, value in raw.items() if value is not None}
    heads, hidden = count(raw, "num_attention_heads", where), count(raw, "hidden_size", where)
    kv_heads = count({"num_key_value_heads": heads, **raw}, "num_key_value_heads", where)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
            "take the checkpoint's own config.json."
        )
    return {
        "vocab_size": count(raw, "vocab_size", where),
        "hidden_size": hidden,
        "intermediate_size": count(raw, "intermediate_size", where),
        "num_layers": count(raw, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": count({"head_dim": hidden // heads, **raw}, "head_dim", where),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "max_position": count({"max_position_embeddings": 2048, **raw}, "max_position_embeddings", where),
        **_rope(raw, where),
    }


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    stated = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {key: value for key, value in stated.items() if value is not None and key not in ROPE_OTHERS}
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta", 10000.0)
    kind = rope.pop("type", "default")
    kind = rope.setdefault("rope_type", kind)
    if kind not in ROPE_REQUIRED:
        raise UserError(f"{where}: rope_type is {kind!r}; use a checkpoint with one of {', '.join(ROPE_REQUIRED)}.")
    for key in ROPE_REQUIRED[kind]:
        if key not in rope:
            raise UserError(f"{where}: {key} of rope_type {kind} is missing; take the checkpoint's own config.json.")
    for key in rope.keys() - {"rope_type", *ROPE_REQUIRED[kind], *ROPE_OPTIONAL}:
        raise UserError(f"{where}: {key} of rope_type {kind} is not supported (got {rope[key]!r}); remove it.")
    return {"rope_theta": float(theta), "rope_scaling": {} if kind == "default" else rope}
