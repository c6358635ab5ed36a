"""The record of the CPU engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import Compile, Detail, EngineKind
from echo_trt.bundle.recipe import Recipe


def _open(
    file: Path, precision: str, num_blocks: int, bounds: CallBounds, facts: dict[str, Any], group: Any = None
) -> Engine:
    from echo_trt.backends.cpu.engine import CPUEngine

    return CPUEngine(file, precision, num_blocks)


def _compiler(recipe: Recipe, folder: Path, detail: Detail) -> tuple[Compile, dict[str, Any]]:
    from echo_trt.backends.cpu.build import compile_role

    return lambda role, name, precision: compile_role(role, folder / f"{name}.cpu", precision), {}


KIND = EngineKind(
    name="cpu",
    precisions=("fp32", "bf16", "int8", "int4"),
    open=_open,
    compiler=_compiler,
    tools=("numba", "llvmlite", "torch"),
)
