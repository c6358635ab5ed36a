"""The shapes of a recipe's networks, from the checkpoints' config.json or from published ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from echo_trt.bundle.recipe import Recipe, Source
from echo_trt.bundle.sources import CONFIG, from_hub
from echo_trt.errors import UserError
from echo_trt.models.block_config import block_config, fitted
from echo_trt.models.hybrid_config import HybridConfig
from echo_trt.models.read_config import check_division, decoder_config, eagle3_config, is_eagle3
from echo_trt.sizing.networks import Sizes, block_sizes, decoder_sizes, head_sizes, mtp_sizes

HEAD_VOCABULARY = 32000  # of published EAGLE-3 heads for vocabularies of 150,000
UNQUANTISED = {"quantization_config": None}  # shapes are those of the weights that a quantised checkpoint stands for


@dataclass(frozen=True)
class Shape:
    """A network's sizes and their origin."""

    sizes: Sizes
    origin: str


@cache
def published() -> dict[str, dict[str, Any]]:
    """Read the published shapes: hub name or wheel -> keys of its config.json."""
    return yaml.safe_load(resources.files("echo_trt.sizing").joinpath("published.yaml").read_text("utf-8"))


def shapes(recipe: Recipe, recipe_folder: Path) -> tuple[Shape, Shape | None]:
    """Return the shapes of the target, on one of ``tensor_parallel`` GPUs, and of a draft network, which is whole."""
    raw, origin = config_of(recipe.target, recipe_folder)
    config = decoder_config(raw, origin)
    check_division(config, recipe.tensor_parallel)
    target = Shape(decoder_sizes(config, recipe.tensor_parallel), origin)
    source = recipe.draft.source
    if recipe.draft.kind == "mtp" and isinstance(config, HybridConfig):
        return target, Shape(mtp_sizes(config), origin)
    if source is None:
        return target, None
    raw, origin = config_of(source, recipe_folder, recipe.draft.kind)
    if recipe.draft.kind == "eagle3":
        head = eagle3_config(raw, origin)
        return target, Shape(head_sizes(head), origin)
    if recipe.draft.kind == "block":
        drafter = fitted(block_config(raw, origin, recipe.draft.block), config, origin)
        return target, Shape(block_sizes(drafter), origin)
    return target, Shape(decoder_sizes(decoder_config(raw, origin)), origin)


def config_of(source: Source, recipe_folder: Path, draft: str = "") -> tuple[dict[str, Any], str]:
    """Return the config.json of a target, or of a draft of the kind ``draft``, and its origin. Raises UserError.

    The shape of an EAGLE-3 head may be made from its target's: a layer of the same widths.
    """
    raw, origin = _config(source, recipe_folder, "draft.source" if draft else "target")
    if source.random_weights and draft == "eagle3" and not is_eagle3(raw):
        vocabulary = min(HEAD_VOCABULARY, raw["vocab_size"])
        head = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": vocabulary}
        return {**raw, **head}, f"a head for {origin}"
    return raw, origin


def _config(source: Source, recipe_folder: Path, key: str) -> tuple[dict[str, Any], str]:
    from echo_trt.models.checkpoint import read_json

    if source.path is not None:
        path = recipe_folder / Path(source.path).expanduser()
        file = path if path.is_file() else path / "config.json"
        if file.exists():
            from echo_trt.models.open_checkpoint import open_checkpoint

            raw = open_checkpoint(file).config if file == path else read_json(file)
            return {**raw, **UNQUANTISED}, str(file)
    name = source.hub or source.wheel
    if name in published():
        return published()[name], f"{name} as published"
    if source.path is None and source.hub:
        return {**read_json(from_hub(source.hub, CONFIG) / "config.json"), **UNQUANTISED}, f"{name} on the hub"
    target_path = source.path or source.file
    named = f", and {key}.hub {name} is not one of the published shapes" if source.hub else ""
    raise UserError(
        f"{key}: {target_path} has no config.json yet{named}; put it there, the weights are not needed for this."
    )
