"""Shapes without weights: ``echo-trt build --random-weights``, whose bundles are as fast as trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.bundle.recipe import NETWORKS, Recipe, Source
from echo_trt.bundle.sources import locate
from echo_trt.cli.recipes import shipped_folder
from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Checkpoint
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.open_tokenizer import read_template
from echo_trt.models.random_checkpoint import RandomCheckpoint
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.sizing.shapes import config_of

STAND_IN = "smollm2-135m.yaml"  # the recipe whose tokenizer stands in
END = "<|end|>"
CHAT = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def with_random_weights(recipe: Recipe) -> Recipe:
    """Return the recipe for networks of its shapes; a draft without a network becomes an EAGLE-3 head.

    What was fitted to the weights is left out: calibration and n-grams.
    """
    raw = recipe.model_dump(exclude_unset=True) | {"name": f"{recipe.name}-random", "calibration": None}
    raw["target"] = {**raw["target"], "random_weights": True, "chat_template": None}
    draft: dict[str, Any] = {**raw.get("draft", {}), "ngrams": None}
    if recipe.draft.kind not in NETWORKS:
        widest = max(recipe.decoding.width, recipe.decoding.static.top_k)
        named = {key: raw["target"].get(key) for key in ("path", "hub", "wheel", "file")}
        draft = {"kind": "eagle3", "source": named, "top_k": max(widest, recipe.draft.top_k)}
    draft["source"] = {**draft["source"], "random_weights": True}
    return parse_recipe({**raw, "draft": draft}, recipe.name)


def open_source(source: Source, recipe_folder: Path, draft: str = "") -> Checkpoint:
    """Open the checkpoint of a target or of a draft of the kind ``draft``, or one of its shape."""
    if not source.random_weights:
        return open_checkpoint(locate(source, recipe_folder))
    config, _ = config_of(source, recipe_folder, draft)
    name = source.hub or source.wheel or Path(source.path or "").name
    return RandomCheckpoint(config, name, lambda: _stand_in(source, recipe_folder, config["vocab_size"]))


def _stand_in(source: Source, recipe_folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of up to ``vocabulary`` tokens: the source's, where it is at hand, else the default target's,
    else one of bytes. ``name_or_path`` says which.
    """
    own = recipe_folder / (source.path or "")
    if source.path and (own / "tokenizer.json").exists():
        return load_tokenizer(own)
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
