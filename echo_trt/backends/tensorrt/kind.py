"""The record of TensorRT, whose engines run on the card that they were built on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import TORCH, Compile, Detail, EngineKind, OnCard
from echo_trt.bundle.manifest import MANIFEST
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError, first_mistake

#: What TensorRT measured while it built, which the next build of the bundle need not measure again.
TIMINGS = "tensorrt.timings"


def _open(
    file: Path, precision: str, num_blocks: int, bounds: CallBounds, facts: dict[str, Any], group: Any = None
) -> Engine:
    from echo_trt.backends.tensorrt.engine import TensorRTEngine
    from echo_trt.backends.tensorrt.library import TensorRTFacts

    try:
        built = TensorRTFacts.model_validate(facts)
    except ValidationError as error:
        where = f"{file.parent / MANIFEST}: engine_facts"
        raise UserError(f"{where}: {first_mistake(error)}; build the bundle again.") from error
    return TensorRTEngine.open(file, built, bounds.requests, bounds.blocks, num_blocks, group, tree=bounds.tree)


def _check(recipe: Recipe) -> None:
    from echo_trt.backends.tensorrt.build import check_machine

    check_machine()


def _compiler(recipe: Recipe, folder: Path, detail: Detail) -> tuple[Compile, dict[str, Any]]:
    from echo_trt.backends.tensorrt.build import TensorRTBuild

    build = TensorRTBuild(recipe, folder, folder / TIMINGS, detail)
    return build.compile, build.facts().model_dump()


KIND = EngineKind(
    name="tensorrt",
    precisions=("fp16", "bf16"),
    open=_open,
    compiler=_compiler,
    card=OnCard(layer_nodes=10, context_bytes=1 << 20, projects_features="target"),
    host=False,
    divides=True,
    fixed_pool=True,
    tools=("torch", "onnx", "onnxscript"),
    modules=TORCH,
    extra="tensorrt",
    kept=(TIMINGS,),
    check=_check,
)
