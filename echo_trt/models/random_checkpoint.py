"""A checkpoint of a network's shape alone: its weights are drawn as they are read, so that none is stored."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from echo_trt.models.block import block_network
from echo_trt.models.block_config import block_config, is_block
from echo_trt.models.block_weights import CONFIDENCE, MARKOV, anchored_sources, dflash_sources
from echo_trt.models.checkpoint import Part
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.read_config import decoder_config, eagle3_config, is_eagle3
from echo_trt.models.weights import decoder_sources, eagle3_sources, tensor_shapes

Shapes = dict[str, tuple[int, ...]]


class RandomCheckpoint:
    """Weights in bf16 as an initialisation has them, always the same ones; norms are 1."""

    def __init__(self, config: dict[str, Any], name: str, tokenizer: Callable[[], Any]):
        """``config`` has the keys of the config.json of the network ``name``. ``tokenizer`` stands in for its own."""
        self.tokenizer = tokenizer
        self.path, self.config = Path(f"random weights of {name}"), config
        self._shapes = _shapes(config, str(self.path))
        layers = config.get("num_hidden_layers", 1)
        self._residual = 1 / math.sqrt(2 * layers)  # of what a layer adds, so that deep networks stay in range

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name == "d2t" else torch.bfloat16

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape, dtype=torch.int64) if name == "d2t" else torch.ones(shape)[part]
        if part:
            shape = tuple(len(range(size)[each]) for size, each in zip(shape, part, strict=True))
        bound = math.sqrt(3 / self._shapes[name][-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            bound *= self._residual
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {part}".encode()))
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _shapes(raw: dict[str, Any], where: str) -> Shapes:
    """Return the shapes of a network's tensors, by the names of its checkpoint. Raises UserError.

    A draft takes the target's embedding, and a block drafter its output matrix, where they may have the same.
    """
    with torch.device("meta"):
        if is_block(raw):
            draft = block_config(raw, where)
            network = block_network(draft, 1, nn.Embedding(draft.vocab_size, draft.hidden_size))
            sources = anchored_sources(draft) if draft.anchored else dflash_sources(draft)
        elif is_eagle3(raw):
            draft = eagle3_config(raw, where)
            network = Eagle3Head(draft, 1, nn.Embedding(draft.vocab_size, draft.hidden_size))
            sources = eagle3_sources(draft, {})
        else:
            config = decoder_config(raw, where)
            return tensor_shapes(Decoder(config, 1), decoder_sources(config, set()))
    shapes = tensor_shapes(network, sources)
    shapes.pop("embed_tokens.weight", None)
    if draft.draft_vocab_size != draft.vocab_size:
        shapes |= {"d2t": (draft.draft_vocab_size,), "lm_head.weight": (draft.draft_vocab_size, draft.hidden_size)}
    if getattr(draft, "markov", ""):
        for name, rows in (("w1", draft.vocab_size), ("w2", draft.draft_vocab_size)):
            shapes[f"{MARKOV}markov_{name}.weight"] = rows, draft.markov_rank
    if getattr(draft, "confidence", False):
        shapes[CONFIDENCE + "weight"] = 1, draft.hidden_size + draft.markov_rank
    return shapes
