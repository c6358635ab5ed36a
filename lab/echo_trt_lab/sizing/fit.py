"""A recipe's fit on a card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.host_memory import gigabytes
from echo_trt.errors import UserError
from echo_trt.sizing.needs import Needs, computed_on, recipe_needs
from echo_trt.sizing.shapes import shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt_lab.sizing.cards import CARDS, Card, knee
from echo_trt_lab.sizing.hardware import share_of


@dataclass(frozen=True)
class CardFit:
    """The fit of a recipe on ``count`` cards; ``spare``: bytes left on one GPU, negative where bytes are missing."""

    card: Card
    count: int
    spare: int
    max_blocks: int
    k_max: int
    k_max_routed: int | None  # of a mixture whose tokens are computed by their chosen experts alone
    fits: bool
    sentence: str


def fit(recipe: Recipe, folder: Path, card: Card, count: int) -> CardFit:
    """Fit a recipe, of ``folder``, on cards. UserError where a checkpoint's shape is not known."""
    recipe = computed_on(recipe, card.capability)
    need, sizes = recipe_needs(recipe, folder), shapes(recipe, folder)[0].sizes
    precision, gpus = recipe.precision, recipe.tensor_parallel
    spare = card.usable - need.fixed - need.pool - need.features
    if spare < 0:
        missing = gigabytes(-spare)
        sentence = f"does not fit: {missing} a GPU are missing; {_remedy(recipe, folder, need, card, count)}."
    elif count < gpus:
        sentence = f"does not fit: tensor_parallel is {gpus}, but there are {count} cards; take {gpus}."
    else:
        sentence = f"fits: {gigabytes(spare)} a GPU are left, room for {max_blocks(need, card):,} KV blocks."
    return CardFit(
        card=card,
        count=count,
        spare=spare,
        max_blocks=max_blocks(need, card),
        k_max=knee(share_of(sizes, precision, routed=False), card.chip),
        k_max_routed=knee(share_of(sizes, precision), card.chip) if sizes.experts else None,
        fits=spare >= 0 and count >= gpus,
        sentence=sentence,
    )


def max_blocks(need: Needs, card: Card) -> int:
    """Return how many KV blocks fit on a card; negative where the memory beside the pool does not fit."""
    return (card.usable - need.fixed) // need.block


def _remedy(recipe: Recipe, folder: Path, need: Needs, card: Card, count: int) -> str:
    """Name the limit to lower, or another remedy where no limit helps."""
    limits, maximum = recipe.limits, max_blocks(need, card)
    if maximum >= need.request_blocks:
        now = f"from {limits.kv_blocks:,}" if limits.kv_blocks else f"({need.blocks:,}, as many as the batch needs)"
        return f"lower limits.kv_blocks {now} to {maximum:,}"
    context = maximum * BLOCK - (need.request_blocks * BLOCK - limits.context)
    if context >= limits.prefill_chunk:
        return f"lower limits.context from {limits.context:,} to {context:,} and limits.kv_blocks to {maximum:,}"
    return f"weights and working memory take {gigabytes(need.fixed)} of {gigabytes(card.usable)}; " + _more_cards(
        recipe, folder, card, count
    )


def _more_cards(recipe: Recipe, folder: Path, card: Card, count: int) -> str:
    for gpus in (2, 4, 8):
        split = recipe.model_copy(update={"tensor_parallel": gpus})
        if _runs(split, folder, card):
            return f"set tensor_parallel to {gpus}" + ("" if gpus <= count else f" and take {gpus} cards")
    others = ", ".join(other.name for other in CARDS.values() if _runs(recipe, folder, other))
    return f"take a larger card ({others})" if others else "no card in the table holds it, so take a smaller model"


def _runs(recipe: Recipe, folder: Path, card: Card) -> bool:
    """Return whether one request has room; no, where this number of GPUs cannot share the network."""
    try:
        need = recipe_needs(computed_on(recipe, card.capability), folder)
    except UserError:
        return False
    return max_blocks(need, card) >= need.request_blocks
