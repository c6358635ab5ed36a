"""``echo-trt inspect``: a bundle's facts, or a recipe's needs and its fit on cards."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rich.console import Console

from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.manifest import MANIFEST, read_manifest, verify_files
from echo_trt.bundle.recipe import Recipe
from echo_trt.cli.recipes import SERVED, for_this_machine, recipe_for
from echo_trt.errors import UserError
from echo_trt.files.inputs import is_gguf
from echo_trt.sizing.limits import limited
from echo_trt_lab.sizing.cards import CARDS, parse_cards
from echo_trt_lab.sizing.fit import fit
from echo_trt_lab.sizing.options import InspectOptions
from echo_trt_lab.sizing.tables import cards_table, manifest_table, recipe_table


def run(options: InspectOptions, console: Console) -> int:
    """Print the tables; returns the exit code, 1 where a recipe does not fit."""
    path, cards = Path(options.path), options.cards
    if options == InspectOptions(options.path) and is_gguf(path):
        options = InspectOptions(options.path, **SERVED)
    if not path.is_dir() or ((path / "config.json").exists() and not (path / MANIFEST).exists()):
        recipe, folder = recipe_for(options.path)
        engine = options.engine or (recipe.engine if cards else None)  # with cards the recipe's own
        recipe, why = for_this_machine(options.path, recipe, folder, engine, options.precision)
        recipe = limited(recipe, options.max_model_len, options.max_num_seqs)
        return 0 if print_recipe(recipe, folder, cards, console, why) else 1
    if cards is not None:
        raise UserError(f"--fit is about a recipe, but {path} is a folder; name the recipe.")
    manifest = read_manifest(path)
    verify_files(path, manifest)
    console.print(manifest_table(manifest, path))
    return 0


def print_recipe(recipe: Recipe, folder: Path, cards: str | None, console: Console, why: str = "") -> bool:
    """Print a recipe on ``cards``, or on all known cards, and why its engine is taken.

    Returns whether it fits ``cards``.
    """
    gpu = engine_kind(recipe.engine).card is not None
    if cards is not None and not gpu:
        raise UserError(f"--fit is about GPUs, but the recipe's engine is {recipe.engine}; use a recipe for tensorrt.")
    requested = parse_cards(cards) if cards is not None else None
    verdict = fit(recipe, folder, *requested) if requested else None
    console.print(recipe_table(recipe, folder, why))
    if verdict:
        console.print(cards_table([verdict]))
        console.print(f"{recipe.name} on {verdict.count} {verdict.card.name}: {verdict.sentence}", soft_wrap=True)
        return verdict.fits
    if gpu:
        with contextlib.suppress(UserError):  # the recipe's table has said what is not known
            console.print(cards_table([fit(recipe, folder, card, recipe.tensor_parallel) for card in CARDS.values()]))
    return True
