"""Tiny random block drafters, in the spelling of each family that publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models.checkpoints import write_head
from torch import Tensor

SHAPE = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 64,
}
#: Layers whose outputs are read; speculators and EAGLE count inputs, one more.
OUTPUTS = [0, 2, 5]
MASK, ROWS, RANK = 90, 4, 5
FAMILIES = (
    "dflash", "deepspec", "dspark", "speculators dflash", "speculators dspark", "p-eagle", "speculators peagle",
)  # fmt: skip


def block_raw(family: str, **changes: Any) -> dict[str, Any]:
    """Return config.json as the family writes it; ``changes`` are of the network's shape or of top-level keys."""
    shape = {key: changes.pop(key) if key in changes else value for key, value in SHAPE.items()}
    heads: dict[str, Any] = {}
    if family in ("dspark", "speculators dspark"):
        heads = {"markov_rank": RANK, "enable_confidence_head": True, "confidence_head_with_markov": True}
    inputs = [layer + 1 for layer in OUTPUTS]
    if family == "dflash":
        inner: dict[str, Any] = {"mask_token_id": MASK, "target_layer_ids": OUTPUTS}
        raw = {**shape, "architectures": ["DFlashDraftModel"], "block_size": ROWS, "dflash_config": inner}
    elif family in ("deepspec", "dspark"):
        raw = {**shape, "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "mask_token_id": MASK}
        raw |= {"block_size": ROWS, "target_layer_ids": OUTPUTS, "markov_rank": 0, **heads}
    elif family == "p-eagle":
        raw = {**shape, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "mask_token_id": MASK}
        raw |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": OUTPUTS}, "draft_vocab_size": 31}
        raw |= {"block_size": ROWS}
    elif family == "speculators peagle":
        raw = {"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"], "mask_token_id": MASK}
        raw |= {"transformer_layer_config": {"model_type": "llama", **shape}, "draft_vocab_size": 31}
        raw |= {"eagle_aux_hidden_state_layer_ids": inputs, "norm_before_residual": True}
        raw |= {"speculators_config": {"proposal_methods": [{"speculative_tokens": ROWS}]}}
    else:
        kind = family.split()[1]
        raw = {"speculators_model_type": kind, "architectures": ["Speculator"], "mask_token_id": MASK, **heads}
        raw |= {"transformer_layer_config": {"model_type": "qwen3", **shape}, "block_size": ROWS}
        raw |= {"aux_hidden_state_layer_ids": inputs, "draft_vocab_size": 31}
    return raw | changes


def block_tensors(raw: dict[str, Any], read: int = len(OUTPUTS)) -> dict[str, Tensor]:
    """Return every tensor of the drafter that ``raw`` describes, in its family's spelling.

    ``read``: layers of the target that it reads.
    """
    c = {**raw.get("transformer_layer_config", {}), **raw}
    hidden, size, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    queries, keys = (c[f"num_{kind}_heads"] * c["head_dim"] for kind in ("attention", "key_value"))
    eagle = "eagle_config" in raw or raw.get("speculators_model_type") == "peagle"
    vocab = raw.get("draft_vocab_size") or c["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, read * hidden), "norm.weight": (hidden,)}
    for i in range(layers):
        first = eagle and i == 0
        layer = "midlayer." if first and "eagle_config" in raw else f"layers.{i}."
        width = 2 * hidden if first else hidden
        shapes |= {
            layer + "self_attn.q_proj.weight": (queries, width),
            layer + "self_attn.k_proj.weight": (keys, width),
            layer + "self_attn.v_proj.weight": (keys, width),
            layer + "self_attn.o_proj.weight": (hidden, queries),
            layer + "mlp.gate_proj.weight": (size, hidden),
            layer + "mlp.up_proj.weight": (size, hidden),
            layer + "mlp.down_proj.weight": (hidden, size),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
        if first:
            shapes[layer + "hidden_norm.weight"] = (hidden,)
        elif not eagle:
            shapes |= {layer + f"self_attn.{name}_norm.weight": (c["head_dim"],) for name in "qk"}
    if eagle:
        shapes["mask_hidden"] = (1, 3 * hidden if "eagle_config" in raw else hidden)
    else:
        shapes["hidden_norm.weight"] = (hidden,)
    if eagle or raw["architectures"] != ["DFlashDraftModel"]:
        shapes |= {"embed_tokens.weight": (c["vocab_size"], hidden), "lm_head.weight": (vocab, hidden)}
    if rank := raw.get("markov_rank"):
        shapes["markov_head.markov_w1.weight"] = (c["vocab_size"], rank)
        shapes["markov_head.markov_w2.weight"] = (vocab, rank)
        shapes |= {"confidence_head.proj.weight": (1, hidden + rank), "confidence_head.proj.bias": (1,)}
    generator = torch.Generator().manual_seed(23)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] *= 6
    if vocab != c["vocab_size"]:
        chosen = torch.randperm(c["vocab_size"], generator=generator)[:vocab].sort().values
        tensors["d2t"] = chosen - torch.arange(vocab)
        tensors["t2d"] = torch.zeros(c["vocab_size"], dtype=torch.bool).index_fill(0, chosen, True)
    return tensors


def write_block(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    if tensors is None:
        ids = raw.get("target_layer_ids") or raw.get("dflash_config", {}).get("target_layer_ids") or OUTPUTS
        tensors = block_tensors(raw, len(ids))
    return write_head(folder, raw, tensors)
