"""Tables for a terminal: a bundle, a recipe, a comparison of policies."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from echo_trt.bundle import Manifest, NetworkFacts
from echo_trt.recipe import Recipe


def manifest_table(manifest: Manifest, folder: Path) -> Table:
    table = _facts(f"bundle {folder}")
    table.add_row("name", manifest.name)
    table.add_row("engine", f"{manifest.engine}, {manifest.precision}")
    table.add_row("target", _network(manifest.target))
    table.add_row("draft", f"{manifest.recipe.draft.kind}{', ' + _network(manifest.draft) if manifest.draft else ''}")
    size = sum((folder / name).stat().st_size for name in manifest.files)
    table.add_row("files", f"{len(manifest.files)}, {size / 1e6:,.0f} MB")
    for name, check in manifest.checks.items():
        table.add_row(
            f"self-check, {name}",
            f"error {max(check.prompt_error, check.tree_error):.1e} of the largest logit (bound {check.bound:g}), "
            f"same best token at {check.same_argmax:.0%}",
        )
    _add_recipe_rows(table, manifest.recipe)
    table.add_row("built with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()))
    return table


def recipe_table(recipe: Recipe) -> Table:
    table = _facts(f"recipe {recipe.name}")
    for role, source in (("target", recipe.target), ("draft", recipe.draft.source)):
        where = source and (source.path or f"{source.wheel}, {source.file}")
        table.add_row(role, " ".join(filter(None, (recipe.draft.kind if role == "draft" else "", where))))
    table.add_row("engine", f"{recipe.engine}, {recipe.precision}")
    _add_recipe_rows(table, recipe)
    return table


def comparison_table(rows: list[dict], plain: dict) -> Table:
    """``rows``: policy, tokens_per_s, accepted_length, identical, requests."""
    table = Table(title="plain decoding against speculation")
    for column in ("policy", "tokens/s", "ratio", "accepted length", "identical texts"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / plain['tokens_per_s']:.2f}x",
            f"{row['accepted_length']:.2f}",
            f"{row['identical']} of {row['requests']}",
        )
    return table


def rounding_note(gaps: dict[str, float], precision: str) -> str:
    """Why texts differ: the two tokens' logits, where a text first parts from plain decoding's."""
    listed = ", ".join(f"{name} {gap:.3g}" for name, gap in gaps.items())
    return (
        f"Where a text parts from plain decoding's, the target's logits of the two tokens differ by: {listed}. "
        f"{precision} rounds a token alike only in calls of one shape, so such near-ties can fall either way; "
        "build with --precision fp32 for texts that are identical token for token."
    )


def _facts(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _network(facts: NetworkFacts) -> str:
    return f"{facts.parameters / 1e6:,.1f} M parameters, {facts.num_layers} layers, vocabulary {facts.vocab_size:,}"


def _add_recipe_rows(table: Table, recipe: Recipe) -> None:
    limits, decoding = recipe.limits, recipe.decoding
    blocks = limits.kv_blocks or "as many as the batch needs"
    table.add_row("limits", f"batch {limits.batch}, context {limits.context:,} tokens, {blocks} KV blocks of 32 tokens")
    gates = ", ".join(f"{depth} at {tau:g}" for depth, tau in sorted((decoding.gates or {}).items()))
    table.add_row(
        "policy",
        f"{decoding.policy}: depth {decoding.max_depth}, beams {decoding.beams}, width {decoding.width}, "
        f"budget {decoding.budget or 'calibrated'}, gates {gates or 'calibrated'}",
    )
