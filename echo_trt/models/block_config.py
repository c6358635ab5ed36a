"""The configuration of a block drafter, which drafts a whole block in one pass, in any of the published spellings.

| family  | told by                                            | rows of a pass           | a row predicts    |
|---------|----------------------------------------------------|--------------------------|-------------------|
| dflash  | DFlashDraftModel, or speculators_model_type dflash | root, masks, all see all | its own position  |
| dspark  | Qwen3DSparkModel, or speculators_model_type dspark | root, masks, all see all | the next position |
| p-eagle | an EAGLE-3 head with a mask token, or peagle       | EAGLE-3's entry, masks   | the next position |

dspark stands for DeepSpec's DFlash, too, which has no heads. Speculators states ``sample_from_anchor`` where rows
predict the next position.

Sources: DFlash arXiv 2602.06036, and the repositories z-lab/dflash, DeepSpec, vllm-project/speculators.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.config import BlockConfig, DecoderConfig
from echo_trt.models.families.family import count
from echo_trt.models.read_config import LAYER_KEYS, _feature_layers, _head_shape, check_fits

SPECULATORS = {"dflash": "dflash", "dspark": "dspark", "peagle": "p-eagle"}
ARCHITECTURES = {"DFlashDraftModel": "dflash", "Qwen3DSparkModel": "dspark", "Qwen3DFlashModel": "dspark"}
P_EAGLE_ROWS = 8  # rows of a P-EAGLE pass where nothing states them; larger: deeper drafts, longer passes


def block_config(raw: dict[str, Any], where: str, rows: int | None = None) -> BlockConfig:
    """Read a block drafter's ``config.json``. ``rows`` replaces the rows of its pass; ``where`` names the file."""
    nested = raw.get("transformer_layer_config") or {}
    family = _family(raw, where)
    inner = raw.get("dflash_config") or {}
    raw = {**nested, **raw, **{key: value for key, value in inner.items() if value is not None}}
    if raw.get("causal_head"):
        raise UserError(
            f"{where}: causal_head is set, which is not supported; use a drafter whose rows see each other."
        )
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise UserError(f"{where}: layer_types names sliding attention, which is not supported; use another drafter.")
    if family == "p-eagle":
        raw.setdefault("norm_before_residual", bool(nested))
    shape = _head_shape(raw, where)
    mask = _mask_token(raw, shape["vocab_size"], where)
    own = _p_eagle(raw, where) if family == "p-eagle" else _dflash(raw, family, where)
    config = BlockConfig(family=family, mask_token=mask, **shape | own)
    if rows is not None:
        config = replace(config, block_size=rows)
    if config.block_size < 2:
        raise UserError(f"{where}: block_size is {config.block_size}, which drafts nothing; it must be 2 or more.")
    return config


def fitted(config: BlockConfig, target: DecoderConfig, where: str) -> BlockConfig:
    """Refuse a drafter of another target; return its configuration with the layers whose features it reads."""
    layers = config.feature_layers or (target.feature_layers if config.anchored else _spread(config, target))
    config = replace(config, feature_layers=layers)
    check_fits(config, target, where)
    return config


def _spread(config: BlockConfig, target: DecoderConfig) -> tuple[int, ...]:
    """Return DFlash's default layers: outputs of layers 1 to L - 3, evenly."""
    count, last = config.num_layers, target.num_layers - 3
    if count == 1:
        return (target.num_layers // 2 + 1,)
    return tuple(round(1 + i * (last - 1) / (count - 1)) + 1 for i in range(count))


def is_block(raw: dict[str, Any]) -> bool:
    """Tell whether a ``config.json`` is a block drafter's."""
    architecture = str((raw.get("architectures") or [""])[0])
    if "speculators_model_type" in raw:
        return raw["speculators_model_type"] in SPECULATORS
    return architecture in ARCHITECTURES or ("eagle3" in architecture.lower() and _stated_mask(raw) is not None)


def _family(raw: dict[str, Any], where: str) -> str:
    kind = raw.get("speculators_model_type")
    if kind is not None:
        if kind not in SPECULATORS:
            raise UserError(
                f"{where}: speculators_model_type is {kind!r}, which is no block drafter that echo-trt knows; use one "
                f"of {', '.join(SPECULATORS)}."
            )
        return SPECULATORS[kind]
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    if "eagle3" in architecture.lower() and _stated_mask(raw) is not None:
        return "p-eagle"
    raise UserError(
        f"{where}: architectures is {architecture!r}, which is no block drafter that echo-trt knows; use one of "
        f"{', '.join(ARCHITECTURES)}, or an EAGLE-3 head with a mask_token_id (P-EAGLE)."
    )


def _stated_mask(raw: dict[str, Any]) -> Any:
    return raw.get("mask_token_id", raw.get("ptd_token_id"))


def _mask_token(raw: dict[str, Any], vocab_size: int, where: str) -> int:
    token = _stated_mask(raw)
    if token is None:
        raise UserError(f"{where}: mask_token_id is missing; take the config.json that belongs to the checkpoint.")
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise UserError(
            f"{where}: mask_token_id is {token!r}, outside the vocabulary of {vocab_size}; take the checkpoint's own "
            "config.json."
        )
    return token


def _dflash(raw: dict[str, Any], family: str, where: str) -> dict[str, Any]:
    """Read what DFlash and DSpark have beyond a network's shape."""
    anchor = raw.get("sample_from_anchor")
    return {
        "block_size": count(raw, "block_size", where),
        **_layers(raw, where),
        "predicts_next": family == "dspark" if anchor is None else bool(anchor),
        "qk_norm": raw.get("model_type") != "llama",
        "confidence": bool(raw.get("enable_confidence_head")),
        "confidence_sees_token": bool(raw.get("confidence_head_with_markov")),
    }


def _layers(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return our ids, and the key that names layers."""
    for key, offset in LAYER_KEYS.items():
        ids = raw.get(key)
        if ids is not None:
            if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
                raise UserError(
                    f"{where}: {key} is {ids!r}, not a list of layers; take the checkpoint's own config.json."
                )
            return {"feature_layers": tuple(layer + offset for layer in ids), "layer_key": key}
    return {"layer_key": next(iter(LAYER_KEYS))}


def _p_eagle(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Read what P-EAGLE has beyond an EAGLE-3 head's shape."""
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    rows = raw.get("block_size") or raw.get("para_depths") or methods[0].get("speculative_tokens") or P_EAGLE_ROWS
    return {
        "block_size": count({"block_size": rows}, "block_size", where),
        "feature_layers": _feature_layers(raw, raw.get("eagle_config") or {}, where),
        "causal": True,
        "predicts_next": True,
        "anchored": True,
        "qk_norm": False,
    }
