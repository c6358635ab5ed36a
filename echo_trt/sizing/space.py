"""The check that a build's files fit on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.host_memory import gigabytes
from echo_trt.errors import UserError
from echo_trt.sizing.fit import needs
from echo_trt.sizing.shapes import shapes


def check_space(recipe: Recipe, recipe_folder: Path, folder: Path) -> None:
    """Refuse a build whose files, the engines of all ranks and the graph of one, would fill the disk of ``folder``."""
    target, draft = shapes(recipe, recipe_folder)
    need = needs(recipe, target.sizes, draft and draft.sizes)
    needed = need.target_weights * (recipe.tensor_parallel + 1) + need.draft_weights
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the build writes about {gigabytes(needed)} into {folder.parent}, where {gigabytes(free)} are free; free "
            f"{gigabytes(needed - free)} more there, or name a folder on another disk with -o."
        )
