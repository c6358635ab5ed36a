"""The record of the CPU engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import Compile, Detail, EngineKind
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError


def _open(
    file: Path, precision: str, num_blocks: int, bounds: CallBounds, facts: dict[str, Any], group: Any = None
) -> Engine:
    from echo_trt.backends.cpu.engine import CPUEngine

    return CPUEngine(file, precision, num_blocks)


def _compiler(recipe: Recipe, folder: Path, detail: Detail) -> tuple[Compile, dict[str, Any]]:
    from echo_trt.backends.cpu.build import compile_role

    return lambda role, name, precision: compile_role(role, folder / f"{name}.cpu", precision), {}


def _check(recipe: Recipe) -> None:
    if recipe.draft.kind in ("block", "mtp"):
        raise UserError(
            f"draft.kind is {recipe.draft.kind}, which engine cpu does not run; build with --engine openvino."
        )
    try:
        from echo_trt.backends.cpu.products import instruction_set

        instruction_set()
    except (ImportError, OSError) as error:
        raise UserError(f"engine cpu cannot run here ({error}); build with --engine openvino.") from error


KIND = EngineKind(
    name="cpu",
    precisions=("fp32", "bf16", "int8", "int4"),
    open=_open,
    compiler=_compiler,
    chosen=True,
    blocks=("int8", "int4"),
    tools=("numba", "llvmlite", "torch"),
    check=_check,
)
