"""The build of a TensorRT engine: export, checks of the graph, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from echo_trt.backends.cuda.device import check_heads, compute_capability, cuda_device
from echo_trt.backends.kind import CompiledRole
from echo_trt.backends.onnx_export import export, in_precision
from echo_trt.backends.tensorrt.compiler import CompileJob, TellPhase, compile_engine
from echo_trt.backends.tensorrt.engine import TensorRTEngine
from echo_trt.backends.tensorrt.graph import name_collectives
from echo_trt.backends.tensorrt.library import TensorRTFacts, load_tensorrt
from echo_trt.backends.tensorrt.profiles import packed_profiles
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError
from echo_trt.models.roles import Role
from super_tree_attention.tensorrt_plugin import prepare_graph

LOG = "tensorrt.log"
AMPERE = 8.0  # least compute capability of our kernels; larger: fewer cards run them


def check_machine() -> None:
    """Refuse a machine that builds nothing: no compiler, or an older card."""
    load_tensorrt()
    check_card(compute_capability(cuda_device()))


def check_card(capability: str) -> None:
    """Refuse a card of a compute capability that the attention kernel does not compile for."""
    if float(capability) < AMPERE:
        raise UserError(f"compute capability {capability}: the attention kernel needs {AMPERE}; take a newer card.")


@dataclass(frozen=True)
class TensorRTBuild:
    """The settings that all networks of one build share; ``folder`` is the bundle's."""

    recipe: Recipe
    folder: Path
    timings: Path
    detail: TellPhase

    def facts(self) -> TensorRTFacts:
        version = load_tensorrt().__version__
        return TensorRTFacts(version=version, capabilities=[compute_capability(cuda_device())])

    def compile(self, role: Role, name: str, precision: str) -> CompiledRole:
        """Write ``name``.engine, which can be checked, but for a rank's: it would wait for the other ranks."""
        config, sizes = role.network.config, CallSizes.of(self.recipe)
        graph, engine = self.folder / f"{name}.onnx", self.folder / f"{name}.engine"
        check_heads(config.head_dim, config.num_heads // config.num_kv_heads)
        export(in_precision(role, precision), graph)
        prepare_graph(graph, graph)
        if config.ranks > 1:
            name_collectives(graph)
        torch.cuda.empty_cache()  # PyTorch keeps what an engine had that was checked, and TensorRT cannot take it
        profiles, checked = packed_profiles(graph, sizes), config.ranks == 1
        compile_engine(CompileJob(graph, profiles, self.timings, self.folder / LOG, checked), engine, self.detail)
        for file in (graph, graph.with_name(graph.name + ".data")):  # the engine has the weights
            file.unlink(missing_ok=True)
        return CompiledRole(engine.name, partial(self.open, engine, sizes) if checked else None, sizes.chunk)

    def open(self, engine: Path, sizes: CallSizes, blocks: int) -> TensorRTEngine:
        """Open an engine for its check."""
        # A check makes two calls: the pool and the graphs of all sizes would take most of its time and memory.
        return TensorRTEngine.open(engine, self.facts(), 1, sizes.blocks, blocks, prepare=False)
