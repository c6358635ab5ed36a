"""The shapes of a recipe's networks, from the checkpoints' config.json or from published ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.recipe import Recipe, Source
from echo_trt.bundle.sources import CONFIG, from_hub
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.errors import UserError
from echo_trt.models.read_config import check_division, decoder_config
from echo_trt.sizing.networks import Sizes, decoder_sizes, draft_sizes

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
    kind, source = draft_kind(recipe.draft.kind), recipe.draft.source
    if not kind.network:
        return target, None
    if source is not None:
        raw, origin = config_of(source, recipe_folder, kind.name)
    own, card = kind.config(raw, origin, recipe, config), engine_kind(recipe.engine).card
    projected = card is not None and card.projects_features == "target"
    return target, Shape(kind.sizes(own) or draft_sizes(own, projected), origin)


def config_of(source: Source, recipe_folder: Path, draft: str = "") -> tuple[dict[str, Any], str]:
    """Return the config.json of a target, or of a draft of the kind ``draft``, and its origin. Raises UserError."""
    raw, origin = _config(source, recipe_folder, "draft.source" if draft else "target")
    if source.random_weights and draft:
        shaped = draft_kind(draft).shaped(raw)
        return shaped, origin if shaped is raw else f"a head for {origin}"
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
