"""The table of a bundle, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from echo_trt.backends.openvino.cpu import computes_in
from echo_trt.bundle.manifest import NGRAMS, Manifest, NetworkFacts
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError


def manifest_table(manifest: Manifest, folder: Path) -> Table:
    table = facts_table(f"bundle {folder}")
    table.add_row("name", manifest.name)
    instead = f", computed in {computes_in(manifest)}: this CPU has no AVX-512"
    table.add_row(
        "engine",
        f"{manifest.engine}, {manifest.precision}{instead * (computes_in(manifest) != manifest.precision)}",
    )
    table.add_row("target", _network(manifest.target))
    if manifest.target.rank_files:
        table.add_row("tensor_parallel", f"{len(manifest.target.rank_files)}: a file per rank, on a GPU each")
    table.add_row("draft", f"{manifest.recipe.draft.kind}{', ' + _network(manifest.draft) if manifest.draft else ''}")
    if NGRAMS in manifest.files:
        table.add_row("n-grams", f"{(folder / NGRAMS).stat().st_size / 1e6:,.1f} MB, which go on where drafts end")
    size = sum((folder / name).stat().st_size for name in manifest.files)
    table.add_row("files", f"{len(manifest.files)}, {size / 1e6:,.0f} MB")
    if manifest.tensorrt:
        built = manifest.tensorrt
        table.add_row("compiled", f"by version {built.version} for compute capability {', '.join(built.capabilities)}")
    for name in ("target", "draft") if manifest.draft else ("target",):
        if name not in manifest.checks:
            table.add_row(f"self-check, {name}", "not run: no machine here runs the engine, or its graph")
    for name, check in manifest.checks.items():
        table.add_row(
            f"self-check, {name}",
            f"{'its graph, by ONNX Runtime: ' * (check.of == 'graph')}"
            f"error {max(check.prompt_error, check.tree_error):.1e} of the largest logit (bound {check.bound:g}), "
            f"same best token at {check.same_argmax:.0%}",
        )
    add_recipe_rows(table, manifest.recipe)
    table.add_row("KV pool here", _pool_here(manifest, folder))
    table.add_row("built with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()))
    return table


def _pool_here(manifest: Manifest, folder: Path) -> str:
    """Tell the KV pool that the bundle has on this machine, or why it does not open."""
    from echo_trt.engine.kv_pool import kv_pool

    try:
        pool = kv_pool(folder, manifest)
    except UserError as error:
        return f"none: {error}"
    return f"{pool.sentence.removeprefix('KV pool: ')}{'; ' * bool(pool.warning)}{pool.warning}"


def facts_table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _network(facts: NetworkFacts) -> str:
    return f"{facts.parameters / 1e6:,.1f} M parameters, {facts.num_layers} layers, vocabulary {facts.vocab_size:,}"


def add_recipe_rows(table: Table, recipe: Recipe) -> None:
    limits, decoding = recipe.limits, recipe.decoding
    needed = "as many as the batch needs" + " and memory holds" * (recipe.engine == "openvino")
    blocks = limits.kv_blocks or needed
    table.add_row("limits", f"batch {limits.batch}, context {limits.context:,} tokens, {blocks} KV blocks of 32 tokens")
    gates = ", ".join(f"{depth} at {tau:g}" for depth, tau in sorted((decoding.gates or {}).items()))
    table.add_row(
        "policy",
        f"{decoding.policy}: depth {decoding.max_depth}, beams {decoding.beams}, width {decoding.width}, "
        f"budget {decoding.budget or 'calibrated'}, gates {gates or 'calibrated'}",
    )
