"""Loading of block drafters: their families' tensor names, the target's tables where they are shared, heads."""

from __future__ import annotations

import logging
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
from echo_trt.models.layers import Embedding, Rotary
from echo_trt.models.weights import _assign, _layer_sources, _mlp_sources, _target_ids, eagle3_sources, head_tensor_name

log = logging.getLogger(__name__)
MARKOV = "markov_head."
EMBEDDING = MARKOV + "markov_w1.weight"  # of the previous token, which the confidence head reads, too
CONFIDENCE = "confidence_head.proj."


def check_block(checkpoint: Checkpoint, target: DecoderConfig, rows: int | None = None) -> BlockConfig:
    """Refuse a drafter that is not one, is incomplete or is another target's, before weights are read.

    rows  rows of its pass, where the recipe states them
    """
    where = str(checkpoint.path)
    config = fitted(block_config(checkpoint.config, where, rows), target, where)
    names = _names(config, checkpoint)
    wanted = {CONFIDENCE + "weight": config.confidence, EMBEDDING: config.confidence and config.confidence_sees_token}
    for name in wanted:
        if wanted[name] and name not in names:
            key = "confidence_head_with_markov" if name == EMBEDDING else "enable_confidence_head"
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
    if any(name.startswith(MARKOV) for name in names):
        log.warning(
            "%s has a Markov head, which is left out: its drafts are used without that correction.", checkpoint.path
        )
    with torch.device("meta"):
        model = block_network(config, positions, Embedding(config.vocab_size, config.hidden_size))
    sources = anchored_sources(config) if config.anchored else dflash_sources(config)
    sources |= {"embed.weight": ["embed_tokens.weight"], "lm_head.weight": ["lm_head.weight"]}
    shared = {}
    if "embed_tokens.weight" not in names:
        shared["embed.weight"] = "embed.weight"
    if "lm_head.weight" not in names:
        shared["lm_head.weight"] = "embed.weight" if target.lm_head is None else "lm_head.weight"
        if config.draft_vocab_size != config.vocab_size:
            raise UserError(
                f"{checkpoint.path}: tensor lm_head.weight is missing, but draft_vocab_size {config.draft_vocab_size} "
                f"is not vocab_size {config.vocab_size}; download the drafter again."
            )
    for ours, theirs in shared.items():
        del sources[ours]
        model.get_submodule(ours.partition(".")[0]).weight = target.get_parameter(theirs)
    model.stored = {ours: target.stored[theirs] for ours, theirs in shared.items() if theirs in target.stored}
    read_apart = {names[name] for name in names if name.startswith((MARKOV, CONFIDENCE, "mask_hidden"))}
    sources = {ours: [names.get(theirs, theirs) for theirs in parts] for ours, parts in sources.items()}
    _assign(model, checkpoint, sources, dtype, read_apart=read_apart)
    model.rotary = Rotary(config, positions)
    model.target_ids = _target_ids(config, checkpoint, names)
    if config.anchored:
        model.mask_state = nn.Parameter(_mask_state(model, checkpoint, names), requires_grad=False)
    elif model.confidence is not None:
        rows = checkpoint.get(names[CONFIDENCE + "weight"])[:, : config.hidden_size]
        model.confidence.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
    return model.eval()


def confidence_by_token(model: BlockNetwork, checkpoint: Checkpoint) -> np.ndarray:
    """Return what the previous token adds to the logit of the drafter's confidence head: float32 [V]."""
    config, names = model.config, _names(model.config, checkpoint)

    def read(name: str) -> Tensor:
        return checkpoint.get(names[name]).float()

    added = torch.zeros(config.vocab_size)
    if config.confidence_sees_token:
        by_token = read(EMBEDDING) @ read(CONFIDENCE + "weight")[0, config.hidden_size :]
        added[model.target_ids if len(by_token) < len(added) else slice(None)] = by_token
    if CONFIDENCE + "bias" in names:
        added += read(CONFIDENCE + "bias")
    return added.numpy()


def _names(config: BlockConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Map DFlash's or EAGLE's spelling of a tensor's name to the checkpoint's."""
    return {head_tensor_name(name, "midlayer." if config.anchored else ""): name for name in checkpoint.names()}


def dflash_sources(config: BlockConfig) -> dict[str, Any]:
    sources: dict[str, Any] = {f"{name}.weight": [f"{name}.weight"] for name in ("fc", "hidden_norm", "norm")}
    for i in range(config.num_layers):
        sources |= _layer_sources(f"layers.{i}.", f"layers.{i}.", config.qk_norm)
        sources |= _mlp_sources(f"layers.{i}.", f"layers.{i}.")
    return sources


def anchored_sources(config: BlockConfig) -> dict[str, Any]:
    sources = eagle3_sources(config, {})
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
