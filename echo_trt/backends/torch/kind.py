"""The record of PyTorch, which runs on a GPU where there is one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import TORCH, Compile, CompiledRole, Detail, EngineKind, OnCard
from echo_trt.bundle.recipe import Recipe

if TYPE_CHECKING:
    from echo_trt.models.roles import Role


def _open(
    file: Path, precision: str, num_blocks: int, bounds: CallBounds, facts: dict[str, Any], group: Any = None
) -> Engine:
    from echo_trt.backends.torch.engine import open_torch

    return open_torch(file, num_blocks, bounds, group)


def _compiler(recipe: Recipe, folder: Path, detail: Detail) -> tuple[Compile, dict[str, Any]]:
    from echo_trt.backends.torch.engine import open_torch
    from echo_trt.backends.torch.files import save_role

    def compile_role(role: Role, name: str, precision: str) -> CompiledRole:
        path = folder / f"{name}.safetensors"
        save_role(role, path, precision)
        return CompiledRole(path.name, partial(open_torch, path))

    return compile_role, {}


KIND = EngineKind(
    name="torch",
    precisions=("fp32", "bf16", "fp16", "fp8"),
    open=_open,
    compiler=_compiler,
    card=OnCard(layer_nodes=12, told_trees=True, drafts_apart=True, projects_features="cache"),
    preference=(3, "for this machine's GPU"),
    divides=True,
    tools=("torch",),
    modules=TORCH,
    extra="torch",
)
