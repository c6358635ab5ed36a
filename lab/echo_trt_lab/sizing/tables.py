"""The tables of a bundle, a recipe, and cards, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from echo_trt.backends.kind import computes_in, engine_kind
from echo_trt.bundle.manifest import NGRAMS, Manifest, NetworkFacts
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.host_memory import available_memory, gigabytes
from echo_trt.engine.kv_pool import KVPool, block_bytes, default_blocks, kv_pool
from echo_trt.errors import UserError
from echo_trt.sizing.needs import Needs, needs
from echo_trt.sizing.networks import Sizes
from echo_trt.sizing.shapes import Shape, shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import POLICIES
from echo_trt_lab.sizing.fit import CardFit
from echo_trt_lab.sizing.hardware import active_parameters

UNLIMITED = "if memory were unlimited, "  # of what the memory at hand will bound


def manifest_table(manifest: Manifest, folder: Path) -> Table:
    table = _facts(f"bundle {folder}")
    table.add_row("name", manifest.name)
    instead = f", computed in {computes_in(manifest)}: this CPU has no AVX-512"
    table.add_row(
        "engine",
        f"{manifest.engine}, {manifest.precision}{instead * (computes_in(manifest) != manifest.precision)}",
    )
    table.add_row("target", _network(manifest.target))
    if manifest.recipe.target.random_weights:
        table.add_row("weights", f"random, of this shape alone, with the tokenizer of {manifest.tokenizer}")
    if manifest.target.rank_files:
        table.add_row("tensor_parallel", f"{len(manifest.target.rank_files)}: a file per rank, on a GPU each")
    table.add_row("draft", f"{manifest.recipe.draft.kind}{', ' + _network(manifest.draft) if manifest.draft else ''}")
    if NGRAMS in manifest.files:
        table.add_row("n-grams", f"{(folder / NGRAMS).stat().st_size / 1e6:,.1f} MB, which go on where drafts end")
    size = sum((folder / name).stat().st_size for name in manifest.files)
    table.add_row("files", f"{len(manifest.files)}, {size / 1e6:,.0f} MB")
    for name, fact in manifest.engine_facts.items():
        table.add_row(f"engine's {name}", fact if isinstance(fact, str) else ", ".join(fact))
    for name in ("target", "draft") if manifest.draft else ("target",):
        if name not in manifest.checks:
            table.add_row(f"self-check, {name}", "not run: no machine here runs the engine, or its graph")
    for name, check in manifest.checks.items():
        table.add_row(
            f"self-check, {name}",
            f"{check.sentence}, same best token at {check.same_argmax:.0%}",
        )
    _add_recipe_rows(table, manifest.recipe)
    table.add_row("KV pool here", _pool_here(manifest, folder))
    table.add_row("built with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()))
    return table


def _pool_here(manifest: Manifest, folder: Path) -> str:
    """Tell the KV pool that the bundle has on this machine, or why it does not open."""
    try:
        pool = kv_pool(folder, manifest)
    except UserError as error:
        return f"none: {error}"
    return f"{pool.sentence.removeprefix('KV pool: ')}{'; ' * bool(pool.warning)}{pool.warning}"


def _facts(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _network(facts: NetworkFacts) -> str:
    return f"{facts.parameters / 1e6:,.1f} M parameters, {facts.num_layers} layers, vocabulary {facts.vocab_size:,}"


def _add_recipe_rows(table: Table, recipe: Recipe) -> None:
    limits, decoding = recipe.limits, recipe.decoding
    needed = "as many as the batch needs" + " and memory holds" * (engine_kind(recipe.engine).card is None)
    blocks = limits.kv_blocks or needed
    table.add_row("limits", f"batch {limits.batch}, context {limits.context:,} tokens, {blocks} KV blocks of 32 tokens")
    gates = ", ".join(f"{depth} at {tau:g}" for depth, tau in sorted((decoding.gates or {}).items()))
    shared = f", budget {decoding.budget or 'measured'}, gates {gates or 'calibrated'}"
    table.add_row(
        "policy",
        f"{decoding.policy}: depth {decoding.max_depth}, beams {decoding.beams}, width {decoding.width}"
        f"{shared * POLICIES[decoding.policy].shares_budget}",
    )


def recipe_table(recipe: Recipe, folder: Path, why: str = "") -> Table:
    """Return what a recipe would build and need of each GPU. No weights are read.

    folder  that its paths are relative to
    why     its engine is taken; "": it is named
    """
    table = _facts(f"recipe {recipe.name}")
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
    table.add_row("engine", ", ".join(filter(None, (recipe.engine, recipe.precision, why))))
    _add_recipe_rows(table, recipe)
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
    table.add_row("engines", f"{'target and draft' if draft else 'target'}, for {calls}")
    drafts = f", draft {gigabytes(need.draft_weights)}" if draft else ""
    table.add_row("weights", f"target {gigabytes(need.target_weights)}{drafts}")
    drafts = f", draft {need.draft_kv_token:,} bytes" if draft else ""
    table.add_row("KV of a token", f"target {need.target_kv_token:,} bytes{drafts}")
    at_most = engine_kind(recipe.engine).card is None and not recipe.limits.kv_blocks  # the rest is the memory's to say
    held = f"{UNLIMITED * at_most}{need.blocks:,} blocks, {need.blocks * BLOCK:,} tokens"
    table.add_row("KV pool", f"{held}, {gigabytes(need.pool)}")
    if at_most:
        pool = _pool_of_recipe(recipe, need, target, draft)
        short = pool.bytes - (pool.available or 0)
        none = f"none: one request of full length takes {gigabytes(short)} more than is free beside the weights"
        table.add_row("KV pool here", none if short > 0 else pool.sentence.removeprefix("KV pool: "))
    table.add_row("working memory", f"about {gigabytes(need.working)}")
    if need.reserved.total:
        table.add_row("taken at the start", f"about {gigabytes(need.reserved.total)}: {need.reserved.sentence}")
    if need.features:
        table.add_row("features", f"{need.features_token:,} bytes of a token of the pool, {gigabytes(need.features)}")
    if need.states:
        table.add_row("states", f"{gigabytes(need.states)}, of all running requests")
    in_all = gigabytes(need.fixed + need.pool + need.features)
    if at_most:
        in_all = f"{gigabytes(need.fixed + pool.bytes)} on this machine; {UNLIMITED}{in_all}"
    table.add_row("in all", in_all)
    if draft and draft.sizes.feature_size and not need.features:
        features = 4 * draft.sizes.feature_size
        table.add_row(
            "host memory",
            f"features of the pool's tokens, {UNLIMITED * at_most}{gigabytes(need.blocks * BLOCK * features)}",
        )


def _pool_of_recipe(recipe: Recipe, need: Needs, target: Shape, draft: Shape | None) -> KVPool:
    """Return the KV pool that a bundle of the recipe would have in the memory that is free on this machine."""
    networks = [(target.sizes, recipe.precision), *([(draft.sizes, recipe.draft_precision)] if draft else [])]
    size, needed = block_bytes(recipe.engine, networks), recipe.request_blocks
    available = available_memory() - need.target_weights - need.draft_weights - need.states
    blocks = default_blocks(need.blocks, available, size, needed)
    return KVPool(blocks, size, needed, recipe.limits.context, available, need.states)


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
