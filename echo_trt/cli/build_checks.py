"""What a build refuses before it reads any weights."""

from __future__ import annotations

from echo_trt.backends.kind import EngineKind, engine_kinds
from echo_trt.backends.states import MAX_ROWS
from echo_trt.bundle.recipe import Precision, Recipe
from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Checkpoint
from echo_trt.models.config import DecoderConfig
from echo_trt.models.fp8_checkpoint import Fp8Checkpoint


def check_engine(recipe: Recipe, config: DecoderConfig | None, kind: EngineKind) -> None:
    """Refuse what an engine does not have for a recipe, or this machine; ``config`` None: of any dense target."""
    check_settings(recipe, kind)
    if config is not None:
        check_states(recipe, config, kind)


def check_settings(recipe: Recipe, kind: EngineKind) -> None:
    """Refuse what an engine does not have, or this machine."""
    if recipe.tensor_parallel > 1 and not kind.divides:
        raise UserError(
            f"tensor_parallel is {recipe.tensor_parallel}, but {recipe.engine} runs on one device; set it to 1, or use "
            f"--engine {_names('divides')}."
        )
    for key, precision in (("precision", recipe.precision), ("draft.precision", recipe.draft.precision)):
        if precision is not None and precision not in kind.precisions:
            have = ", ".join(kind.precisions)
            raise UserError(f"{key} is {precision!r}, which {recipe.engine} does not have; use one of {have}.")
    kind.check(recipe)


def _names(trait: str) -> str:
    """List the engines that have a trait, such as ``divides``."""
    return " or ".join(kind.name for kind in engine_kinds() if getattr(kind, trait))


def check_fp8(key: str, precision: Precision, checkpoint: Checkpoint) -> None:
    if precision == "fp8" and not isinstance(checkpoint, Fp8Checkpoint):
        raise UserError(f"{key} is 'fp8', but {checkpoint.path} has no FP8 weights; use bf16, or an FP8 checkpoint.")


def check_states(recipe: Recipe, config: DecoderConfig, kind: EngineKind) -> None:
    """Refuse what a target with recurrent layers does not have."""
    if not config.states.shapes:
        return
    if not kind.states:
        raise UserError(
            f"engine is {recipe.engine}, but a target with recurrent layers runs on {_names('states')} alone; use "
            "one of these."
        )
    tree = max(recipe.decoding.per_request, recipe.decoding.static.tokens)
    if tree > MAX_ROWS:
        raise UserError(
            f"decoding.per_request or static.tokens is {tree}, but a target with recurrent layers verifies {MAX_ROWS} "
            "tokens of a request at most; lower it."
        )
