"""Shapes without weights: ``echo-trt build --random-weights``, whose bundles are as fast as trained ones.

A checkpoint's weights are drawn as they are read, so that none is stored.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.bundle.recipe import Recipe, Source
from echo_trt.bundle.sources import locate
from echo_trt.cli.recipes import shipped_folder
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.errors import UserError
from echo_trt.models.block import block_network
from echo_trt.models.block_config import block_config, is_block
from echo_trt.models.block_weights import CONFIDENCE, EMBEDDING, anchored_sources, dflash_sources
from echo_trt.models.checkpoint import Part
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.hybrid_config import HybridConfig, mtp_config
from echo_trt.models.mtp import MtpHead
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.open_tokenizer import checkpoint_tokenizer, read_template
from echo_trt.models.read_config import decoder_config, eagle3_config, is_eagle3
from echo_trt.models.weights import decoder_class, decoder_sources, eagle3_sources, heights, mtp_sources
from echo_trt.sizing.shapes import config_of

STAND_IN = "smollm2-135m.yaml"  # the recipe whose tokenizer stands in
END = "<|end|>"
CHAT = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
DECAY = "linear_attn.A_log"  # of delta-net layers
TensorShapes = dict[str, tuple[int, ...]]


def with_random_weights(recipe: Recipe) -> Recipe:
    """Return the recipe for networks of its shapes; a draft without a network becomes an EAGLE-3 head.

    What was fitted to the weights is left out: calibration and n-grams.
    """
    raw = recipe.model_dump(exclude_unset=True) | {"name": f"{recipe.name}-random", "calibration": None}
    raw["target"] = {**raw["target"], "random_weights": True, "chat_template": None}
    draft: dict[str, Any] = {**raw.get("draft", {}), "ngrams": None}
    if not draft_kind(recipe.draft.kind).network:
        widest = max(recipe.decoding.width, recipe.decoding.static.top_k)
        named = {key: raw["target"].get(key) for key in ("path", "hub", "wheel", "file")}
        draft = {"kind": "eagle3", "source": named, "top_k": max(widest, recipe.draft.top_k)}
    if "source" in draft:
        draft["source"] = {**draft["source"], "random_weights": True}
    return parse_recipe({**raw, "draft": draft}, recipe.name)


def random_checkpoint(source: Source, recipe_folder: Path, draft: str) -> RandomCheckpoint:
    """Return a checkpoint of the shape of a target, or of a draft of the kind ``draft``."""
    config, _ = config_of(source, recipe_folder, draft)
    name = source.hub or source.wheel or Path(source.path or "").name
    return RandomCheckpoint(config, name, lambda: _stand_in(source, recipe_folder, config["vocab_size"]))


def _stand_in(source: Source, recipe_folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of up to ``vocabulary`` tokens: the source's, where it is at hand, else the default target's,
    else one of bytes. ``name_or_path`` says which.
    """
    own = recipe_folder / (source.path or "")
    if source.path and (own / "tokenizer.json").exists():
        return checkpoint_tokenizer(own)
    default = load_recipe(shipped_folder() / STAND_IN).target
    try:
        tokenizer = open_checkpoint(locate(default, shipped_folder())).tokenizer()  # type: ignore[attr-defined]
    except UserError:  # no network
        return _bytes()
    tokenizer.chat_template = read_template(shipped_folder() / str(default.chat_template))
    tokenizer.name_or_path = default.wheel
    return tokenizer if len(tokenizer) <= vocabulary else _bytes()


def _bytes() -> PreTrainedTokenizerFast:
    alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: id for id, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kind = {"eos_token": END, "chat_template": CHAT, "name_or_path": "bytes"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kind)


class RandomCheckpoint:
    """Weights in bf16 as an initialisation has them, always the same ones; norms are 1.

    A hybrid's have the deviation and decays of transformers' initialisation: with larger weights, transformers' network
    in bf16 is half of the largest logit off its network in fp32, too.
    """

    def __init__(self, config: dict[str, Any], name: str, tokenizer: Callable[[], Any]):
        """``config`` has the keys of the config.json of the network ``name``. ``tokenizer`` stands in for its own."""
        self.tokenizer = tokenizer
        self.path = Path(f"random weights of {name}")
        self.config = {**config, "target_sha256": ""}  # of weights that a head was trained for
        self._shapes = _shapes(config, str(self.path))
        layers = config.get("num_hidden_layers", 1)
        self._residual = 1 / math.sqrt(2 * layers)  # of what a layer adds, so that deep networks stay in range
        hybrid = any(name.endswith(DECAY) for name in self._shapes)
        self._deviation = config.get("initializer_range", 0.02) if hybrid else 0.0

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name == "d2t" else torch.bfloat16

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {part}".encode()))
        if len(shape) == 1:
            return self._vector(name, shape, generator)[part]
        if part:
            shape = tuple(len(range(size)[each]) for size, each in zip(shape, part, strict=True))
        bound = math.sqrt(3) * self._deviation or math.sqrt(3 / self._shapes[name][-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")) and not self._deviation:
            bound *= self._residual
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

    def _vector(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if name == "d2t":
            return torch.zeros(shape, dtype=torch.int64)
        if name.endswith(DECAY):
            return torch.empty(shape).uniform_(0.01, 16, generator=generator).log()
        # A hybrid's norms are stored without their 1, but for the gated one.
        stored = self._deviation and "norm" in name and "linear_attn" not in name
        return torch.zeros(shape) if stored else torch.ones(shape)


def _shapes(raw: dict[str, Any], where: str) -> TensorShapes:
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
            shapes = tensor_shapes(decoder_class(config)(config, 1), decoder_sources(config, set()))
            if isinstance(config, HybridConfig):
                head = MtpHead(mtp_config(config, where), 1)
                shapes |= tensor_shapes(head, mtp_sources())
            return shapes
    shapes = tensor_shapes(network, sources)
    shapes.pop("embed_tokens.weight", None)
    if draft.draft_vocab_size != draft.vocab_size:
        shapes |= {"d2t": (draft.draft_vocab_size,), "lm_head.weight": (draft.draft_vocab_size, draft.hidden_size)}
    if getattr(draft, "confidence", False):
        rank = raw["markov_rank"] if draft.confidence_sees_token else 0
        shapes |= {CONFIDENCE + "weight": (1, draft.hidden_size + rank), EMBEDDING: (draft.vocab_size, rank)}
    return shapes


def tensor_shapes(model: nn.Module, sources: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of ``sources`` have for the undivided ``model``."""
    shapes = {}
    for ours, parts in sources.items():
        shape, nested = model.get_parameter(ours).shape, isinstance(parts[0], list)
        for names in parts if nested else [parts]:
            whole = shape[1:] if nested else shape
            each = heights(model.config, len(names)) if len(names) > 2 else [whole[0] // len(names)] * len(names)
            shapes |= {name: (height, *whole[1:]) for name, height in zip(names, each, strict=True)}
    return shapes
