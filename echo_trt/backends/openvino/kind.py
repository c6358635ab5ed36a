"""The record of OpenVINO."""

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
    from echo_trt.backends.openvino.engine import OpenVINOEngine

    return OpenVINOEngine(file, precision, num_blocks)


def _compiler(recipe: Recipe, folder: Path, detail: Detail) -> tuple[Compile, dict[str, Any]]:
    from echo_trt.backends.openvino.build import compile_role

    return lambda role, name, precision: compile_role(role, folder / f"{name}.onnx", precision), {}


def _value_bytes(precision: str) -> int:
    from echo_trt.backends.openvino.cpu import compute_type

    return int(compute_type(precision).size)


def _computes_in(precision: str) -> str:
    from echo_trt.backends.openvino.cpu import stores_fp16

    return "fp32" if stores_fp16(precision) else precision


KIND = EngineKind(
    name="openvino",
    precisions=("fp32", "bf16"),
    open=_open,
    compiler=_compiler,
    preference=(1, "the fastest here that builds this"),
    tools=("openvino", "torch", "onnx", "onnxscript"),
    value_bytes=_value_bytes,
    computes_in=_computes_in,
)
