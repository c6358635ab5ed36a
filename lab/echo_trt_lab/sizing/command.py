"""``echo-trt inspect``: a bundle's facts, or a recipe's needs and its fit on cards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from echo_trt.bundle.manifest import read_manifest, verify_files
from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.cli.tables import add_recipe_rows, facts_table, manifest_table
from echo_trt.engine.host_memory import gigabytes
from echo_trt.errors import UserError
from echo_trt.sizing.needs import needs
from echo_trt.sizing.networks import Sizes
from echo_trt.sizing.shapes import Shape, shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt_lab.sizing.cards import CARDS, parse_cards
from echo_trt_lab.sizing.fit import CardFit, fit
from echo_trt_lab.sizing.hardware import active_parameters
from echo_trt_lab.sizing.options import InspectOptions


def run(options: InspectOptions, console: Console) -> int:
    """Print the tables; returns the exit code, 1 where a recipe does not fit."""
    path, cards = options.path, options.cards
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; name a bundle's folder, or a recipe's YAML file.")
    if not path.is_dir():
        return 0 if print_recipe(load_recipe(path), path.parent, cards, console) else 1
    if cards is not None:
        raise UserError(f"--fit is about a recipe, but {path} is a folder; name the recipe's YAML file.")
    manifest = read_manifest(path)
    verify_files(path, manifest)
    console.print(manifest_table(manifest, path))
    return 0


def print_recipe(recipe: Recipe, folder: Path, cards: str | None, console: Console) -> bool:
    """Print a recipe on ``cards``, or on all known cards. Returns whether it fits ``cards``."""
    gpu = recipe.engine != "openvino"
    if cards is not None and not gpu:
        raise UserError("--fit is about GPUs, but the recipe's engine is openvino; use a recipe for tensorrt.")
    requested = parse_cards(cards) if cards is not None else None
    verdict = fit(recipe, folder, *requested) if requested else None
    console.print(recipe_table(recipe, folder))
    if verdict:
        console.print(cards_table([verdict]))
        console.print(f"{recipe.name} on {verdict.count} {verdict.card.name}: {verdict.sentence}", soft_wrap=True)
        return verdict.fits
    if gpu:
        with contextlib.suppress(UserError):  # the recipe's table has said what is not known
            console.print(cards_table([fit(recipe, folder, card, recipe.tensor_parallel) for card in CARDS.values()]))
    return True


def recipe_table(recipe: Recipe, folder: Path) -> Table:
    """Return what a recipe would build and need of each GPU; ``folder``: the recipe's. No weights are read."""
    table = facts_table(f"recipe {recipe.name}")
    try:
        networks = dict(zip(("target", "draft"), shapes(recipe, folder), strict=True))
    except UserError as error:
        networks, unknown = {}, str(error)
    for role, source in (("target", recipe.target), ("draft", recipe.draft.source)):
        where = source and (source.hub or source.path or f"{source.wheel}, {source.file}")
        shape = networks.get(role)
        kind = recipe.draft.kind if role == "draft" else ""
        known = f"({_summary(shape.sizes)}; {shape.origin})" if shape else ""
        table.add_row(role, " ".join(filter(None, (kind, where, known))))
    table.add_row("engine", f"{recipe.engine}, {recipe.precision}")
    add_recipe_rows(table, recipe)
    if networks:
        _add_needs(table, recipe, networks["target"], networks["draft"])
    else:
        table.add_row("needs", f"not known: {unknown}")
    return table


def _add_needs(table: Table, recipe: Recipe, target: Shape, draft: Shape | None) -> None:
    need = needs(recipe, target.sizes, draft and draft.sizes)
    if recipe.tensor_parallel > 1:
        table.add_row(
            "tensor_parallel",
            f"{recipe.tensor_parallel}: what follows is the first GPU's, which has the draft too",
        )
    sizes = need.calls
    calls = f"calls of 1 to {need.tokens:,} packed tokens of up to {sizes.batch:,} requests"
    if need.contiguous:
        calls = f"trees of up to {sizes.batch:,} requests x {sizes.tree} tokens, and chunks of {sizes.chunk:,}"
    table.add_row("engines", f"{'target and draft' if draft else 'target'}, for {calls}")
    drafts = f", draft {gigabytes(need.draft_weights)}" if draft else ""
    table.add_row("weights", f"target {gigabytes(need.target_weights)}{drafts}")
    drafts = f", draft {need.draft_kv_token:,} bytes" if draft else ""
    table.add_row("KV of a token", f"target {need.target_kv_token:,} bytes{drafts}")
    at_most = recipe.engine == "openvino" and not recipe.limits.kv_blocks  # the rest is the memory's to say
    held = f"{'at maximum ' * at_most}{need.blocks:,} blocks, {need.blocks * BLOCK:,} tokens"
    table.add_row("KV pool", f"{held}, {gigabytes(need.pool)}" + (", a slot's whole context each" * need.contiguous))
    table.add_row("working memory", f"about {gigabytes(need.working)}")
    if need.graphs:
        table.add_row("CUDA graphs", f"about {gigabytes(need.graphs)}")
    if need.features:
        table.add_row("features", f"{need.features_token:,} bytes of a token of the pool, {gigabytes(need.features)}")
    table.add_row("in all", gigabytes(need.fixed + need.pool + need.features))
    if draft and draft.sizes.feature_size and not need.features:
        features = 4 * draft.sizes.feature_size
        table.add_row("host memory", f"features of the pool's tokens, {gigabytes(need.blocks * BLOCK * features)}")


def cards_table(fits: list[CardFit]) -> Table:
    table = Table(title="on cards (90 % of their memory)", title_justify="left")
    for column in ("card", "GPUs", "fits", "left, a GPU", "KV blocks at most", "K_max"):
        table.add_column(column, justify="left" if column == "card" else "right")
    if fits[0].k_max_routed:
        table.add_column("K_max, routed", justify="right")
    for one in fits:
        row = [one.card.name, str(one.count), "yes" if one.fits else "no", f"{one.spare / 1e9:,.1f} GB"]
        row += [f"{max(one.max_blocks, 0):,}", f"{one.k_max:,}"]
        table.add_row(*row, *([f"{one.k_max_routed:,}"] if one.k_max_routed else []))
    return table


def _summary(sizes: Sizes) -> str:
    active = f", {_billions(active_parameters(sizes))} active" if sizes.experts else ""
    layers = f"{sizes.num_layers} layer{'s' * (sizes.num_layers > 1)}"
    return f"{_billions(sizes.total)} parameters{active}, {layers}, vocabulary {sizes.vocab_size:,}"


def _billions(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.0f} M"
