"""A recipe's limits by the flags that other engines have: context, running requests, share of a GPU's memory."""

from __future__ import annotations

from pathlib import Path

from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.read_recipe import parse_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.host_memory import gigabytes
from echo_trt.engine.kv_pool import block_bytes, check_memory
from echo_trt.errors import UserError
from echo_trt.sizing.needs import computed_on, recipe_needs
from echo_trt.sizing.shapes import shapes
from echo_trt.speculation.pack import BLOCK


def limited(recipe: Recipe, max_model_len: int | None, max_num_seqs: int | None) -> Recipe:
    """Return the recipe with limits.context and limits.batch as given.

    Its KV blocks stay, but on a CPU where one request of that context does not fit: the pool then follows the memory.
    """
    changes = {"context": max_model_len, "batch": max_num_seqs}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return recipe
    raw, limits = recipe.model_dump(exclude_unset=True), recipe.limits.model_copy(update=changes)
    blocks = limits.kv_blocks
    on_cpu, shorter = engine_kind(recipe.engine).card is None, recipe.model_copy(update={"limits": limits})
    if on_cpu and blocks and blocks < shorter.request_blocks:
        blocks = None
    raw["limits"] = {**raw.get("limits", {}), **changes, "kv_blocks": blocks}
    return parse_recipe(raw, f"{recipe.name} with the limits that were given")


def with_kv_cache(recipe: Recipe, folder: Path, memory: int) -> Recipe:
    """Return the recipe with as many KV blocks as ``memory`` bytes hold. ``folder``: that its paths are relative to."""
    target, draft = shapes(recipe, folder)
    networks = [(target.sizes, recipe.precision)]
    if draft:
        networks.append((draft.sizes, recipe.draft_precision))
    size = block_bytes(recipe.engine, networks)
    check_memory(memory, recipe.request_blocks * size, recipe.limits.context)
    limits = recipe.limits.model_copy(update={"kv_blocks": memory // size})
    return recipe.model_copy(update={"limits": limits})


def filling(recipe: Recipe, folder: Path, total: int, utilization: float, name: str, capability: str) -> Recipe:
    """Return the recipe with as many KV blocks as fit into a share of a card's memory.

    folder       that the recipe's paths are relative to
    total        bytes of the card ``name``, of compute capability ``capability``
    utilization  share of them, 0 to 1

    Raises UserError where one request of limits.context does not fit.
    """
    need = recipe_needs(computed_on(recipe, capability), folder)
    free_tokens = int(total * utilization) - need.fixed
    blocks = free_tokens // need.block
    if blocks < need.request_blocks:
        context = blocks * BLOCK - (need.request_blocks * BLOCK - recipe.limits.context)
        shorter = f", or lower --max-model-len to {context}" if context >= recipe.limits.prefill_chunk else ""
        raise UserError(
            f"--gpu-memory-utilization is {utilization:g} of {gigabytes(total)} ({name}), but weights and working "
            f"memory take {gigabytes(need.fixed)} and a request of {recipe.limits.context:,} tokens "
            f"{gigabytes(need.request_blocks * need.block)}; raise it{shorter}."
        )
    limits = recipe.limits.model_copy(update={"kv_blocks": blocks})
    return recipe.model_copy(update={"limits": limits})
