"""Loading of block drafters: their families' tensor names, the target's tables where they are shared, Markov heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echo_trt.errors import UserError
from echo_trt.models.block import BlockNetwork, block_network
from echo_trt.models.block_config import block_config, fitted
from echo_trt.models.checkpoint import Checkpoint
from echo_trt.models.config import BlockConfig, DecoderConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.layers import Rotary
from echo_trt.models.weights import (
    _assign,
    _eagle3_sources,
    _layer_sources,
    _mlp_sources,
    _target_ids,
    head_tensor_name,
)

MARKOV = "markov_head."
CONFIDENCE = "confidence_head.proj."
#: The projection that mixes a Markov head's inputs, by its kind.
MIXING = {"gated": MARKOV + "gate_proj.", "rnn": MARKOV + "joint_proj."}


def check_block(checkpoint: Checkpoint, target: DecoderConfig, rows: int | None = None) -> BlockConfig:
    """Refuse a drafter that is not one, is incomplete or is another target's, before weights are read.

    rows  rows of its pass, where the recipe states them
    """
    where = str(checkpoint.path)
    config = fitted(block_config(checkpoint.config, where, rows), target, where)
    names = _names(config, checkpoint)
    for name in _head_tensors(config):
        if name not in names:
            key = "markov_rank" if name.startswith(MARKOV) else "enable_confidence_head"
            raise UserError(
                f"{where}: tensor {name} is missing, but config.json has {key} {checkpoint.config.get(key)}; download "
                "the drafter again."
            )
    if (checkpoint.path / "mask_embedding.pt").exists():
        raise UserError(f"{where}: mask_embedding.pt is not supported; use a drafter whose mask is a token.")
    own, theirs = config.hidden_size, target.hidden_size
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name not in names and own != theirs:
            raise UserError(
                f"{where}: tensor {name} is missing and hidden_size {own} is not the target's {theirs}; use a drafter "
                "with its own."
            )
    return config


def load_block(
    checkpoint: Checkpoint, positions: int, target: Decoder, dtype: torch.dtype = torch.float32, rows: int | None = None
) -> BlockNetwork:
    """Load a drafter for ``target``, with its own embeddings and output matrix or the target's."""
    config = check_block(checkpoint, target.config, rows)
    names = _names(config, checkpoint)
    with torch.device("meta"):
        model = block_network(config, positions, nn.Embedding(config.vocab_size, config.hidden_size))
    sources = _anchored_sources(config) if config.anchored else _dflash_sources(config)
    sources |= {"embed.weight": ["embed_tokens.weight"], "lm_head.weight": ["lm_head.weight"]}
    if "embed_tokens.weight" not in names:
        del sources["embed.weight"]
        model.embed.weight = target.embed.weight
    if "lm_head.weight" not in names:
        del sources["lm_head.weight"]
        model.lm_head.weight = target.embed.weight if target.lm_head is None else target.lm_head.weight
        if config.draft_vocab_size != config.vocab_size:
            raise UserError(
                f"{checkpoint.path}: tensor lm_head.weight is missing, but draft_vocab_size {config.draft_vocab_size} "
                f"is not vocab_size {config.vocab_size}; download the drafter again."
            )
    read_apart = {names[name] for name in names if name.startswith((MARKOV, CONFIDENCE, "mask_hidden"))}
    sources = {ours: [names.get(theirs, theirs) for theirs in parts] for ours, parts in sources.items()}
    _assign(model, checkpoint, sources, dtype, read_apart=read_apart)
    model.rotary = Rotary(config, positions)
    model.target_ids = _target_ids(config, checkpoint, names)
    if config.anchored:
        model.mask_state = nn.Parameter(_mask_state(model, checkpoint, names), requires_grad=False)
    elif model.hint is not None:
        model.hint.weight = nn.Parameter(_hint(config, checkpoint, names).to(dtype), requires_grad=False)
    return model.eval()


def markov_arrays(model: BlockNetwork, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return what the runtime needs of the Markov and confidence heads, float32 (echo_trt.engine.drafters.markov).

    w1                 [V, r], embedding of the previous token
    w2                 [V, r], rows of tokens outside the draft vocabulary are 0
    token, state, bias [r or 3r, r], [3r, r] and [r or 3r]: what mixes with a row's hint, of gated and rnn heads
    confidence_token, confidence_bias  [r] and [1], of a confidence head
    """
    config, names = model.config, _names(model.config, checkpoint)
    rank, hidden = config.markov_rank, config.hidden_size

    def read(name: str) -> Tensor:
        return checkpoint.get(names[name]).float()

    def by_target_id(rows: Tensor) -> Tensor:
        whole = torch.zeros(config.vocab_size, rank)
        whole[model.target_ids] = rows
        return whole

    found: dict[str, Tensor] = {}
    if config.markov:
        w1, w2 = (read(f"{MARKOV}markov_{name}.weight") for name in ("w1", "w2"))
        found["w1"] = w1 if len(w1) == config.vocab_size else by_target_id(w1)
        found["w2"] = by_target_id(w2)
    if config.markov in MIXING:
        mixing = read(MIXING[config.markov] + "weight")
        token = slice(hidden, None) if config.markov == "gated" else slice(rank, 2 * rank)
        found["token"], found["bias"] = mixing[:, token], read(MIXING[config.markov] + "bias")
        if config.markov == "rnn":
            found["state"] = mixing[:, :rank]
    if config.confidence:
        weight = read(CONFIDENCE + "weight")[0]
        found["confidence_token"] = weight[hidden:]
        found["confidence_bias"] = read(CONFIDENCE + "bias") if CONFIDENCE + "bias" in names else torch.zeros(1)
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in found.items()}


def _names(config: BlockConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Map DFlash's or EAGLE's spelling of a tensor's name to the checkpoint's."""
    return {head_tensor_name(name, "midlayer." if config.anchored else ""): name for name in checkpoint.names()}


def _head_tensors(config: BlockConfig) -> list[str]:
    names = [f"{MARKOV}markov_w1.weight", f"{MARKOV}markov_w2.weight"] if config.markov else []
    if config.markov in MIXING:
        names += [MIXING[config.markov] + "weight", MIXING[config.markov] + "bias"]
    return names + ([CONFIDENCE + "weight"] if config.confidence else [])


def _dflash_sources(config: BlockConfig) -> dict[str, Any]:
    sources: dict[str, Any] = {f"{name}.weight": [f"{name}.weight"] for name in ("fc", "hidden_norm", "norm")}
    for i in range(config.num_layers):
        sources |= _layer_sources(f"layers.{i}.", f"layers.{i}.", config.qk_norm)
        sources |= _mlp_sources(f"layers.{i}.", f"layers.{i}.")
    return sources


def _anchored_sources(config: BlockConfig) -> dict[str, Any]:
    sources = _eagle3_sources(config, {})
    for i in range(1, config.num_layers):
        sources |= _layer_sources(f"layers.{i - 1}.", f"layers.{i}.", qk_norm=False)
        sources |= _mlp_sources(f"layers.{i - 1}.", f"layers.{i}.")
    return sources


@torch.no_grad()
def _mask_state(model: BlockNetwork, checkpoint: Checkpoint, names: dict[str, str]) -> Tensor:
    """Return the hidden state of masked rows [H]; a stored one of three features goes through ``fc``."""
    if "mask_hidden" not in names:
        raise UserError(f"{checkpoint.path}: tensor mask_hidden is missing; use a complete checkpoint of P-EAGLE.")
    stored = checkpoint.get(names["mask_hidden"]).reshape(1, -1).to(model.fc.weight.dtype)
    hidden, features = model.config.hidden_size, model.fc.in_features
    if stored.shape[1] not in (hidden, features):
        raise UserError(
            f"{checkpoint.path}: tensor mask_hidden has {stored.shape[1]} numbers, neither {hidden} nor {features}; "
            "take weights and config.json of the same model."
        )
    return (stored if stored.shape[1] == hidden else model.combine(stored))[0]


def _hint(config: BlockConfig, checkpoint: Checkpoint, names: dict[str, str]) -> Tensor:
    """Return the rows [G, H] by which the heads read a hidden state: the Markov head's, then the confidence head's."""
    parts = []
    if config.markov in MIXING:
        mixing = checkpoint.get(names[MIXING[config.markov] + "weight"])
        first = 0 if config.markov == "gated" else 2 * config.markov_rank
        parts.append(mixing[:, first : first + config.hidden_size])
    if config.confidence:
        parts.append(checkpoint.get(names[CONFIDENCE + "weight"])[:, : config.hidden_size])
    return torch.cat(parts)
