"""The record of the CPU engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import Compile, Detail, EngineKind
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError

DRAFTS = ("none", "lookup", "model", "eagle3", "mtp", "block")  # whose networks it has programs for


def _open(
    file: Path, precision: str, num_blocks: int, bounds: CallBounds, facts: dict[str, Any], group: Any = None
) -> Engine:
    from echo_trt.backends.cpu.engine import CPUEngine

    return CPUEngine(file, precision, num_blocks, slots=bounds.requests)


def _compiler(recipe: Recipe, folder: Path, detail: Detail) -> tuple[Compile, dict[str, Any]]:
    from echo_trt.backends.cpu.build import compile_role

    facts: dict[str, str] = {}  # filled as it compiles
    return lambda role, name, precision: compile_role(role, folder / f"{name}.cpu", precision, facts), facts


def _check(recipe: Recipe) -> None:
    if recipe.draft.kind not in DRAFTS:
        raise UserError(
            f"draft.kind is {recipe.draft.kind}, which engine cpu does not run; build with --engine openvino."
        )
    if lacked := _lacked():
        raise UserError(f"engine cpu cannot run here ({lacked}); build with --engine openvino.")


def _lacked() -> str:
    """Say what this machine lacks for it."""
    try:
        from echo_trt.backends.cpu.products import instruction_set

        instruction_set()
    except (ImportError, OSError) as error:
        return str(error)
    return ""


KIND = EngineKind(
    name="cpu",
    precisions=("fp32", "bf16", "int8", "int4"),
    open=_open,
    compiler=_compiler,
    # A pass of 1 to 16 tokens takes 0.4 to 0.75 of OpenVINO's time at 1.5B in 4 bits, and 0.4 to 0.85 at 135M in bf16
    # and fp32, on a Xeon with AVX-512 VNNI and AMX. Prompts in bf16 take longer, which are a small part of the work.
    preference=(2, "the fastest on this CPU"),
    runs_here=lambda: not _lacked(),
    states=True,
    chosen=True,
    blocks=("int8", "int4"),
    tools=("numba", "llvmlite", "torch"),
    check=_check,
)
