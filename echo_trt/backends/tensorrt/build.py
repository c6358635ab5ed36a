"""The build of a TensorRT or TensorRT-RTX engine: export, checks of the graph, compilation, check on a card."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from echo_trt.backends.cuda.device import check_heads, compute_capability, cuda_device, has_cuda
from echo_trt.backends.native_export import export_native, in_precision
from echo_trt.backends.onnx_export import export
from echo_trt.backends.self_check import LINEAR_TABLE, check_engine
from echo_trt.backends.tensorrt.compiler import (
    COMPILERS,
    CompileJob,
    TellPhase,
    check_capabilities,
    check_precision,
    compile_engine,
    known_capabilities,
    load_compiler,
)
from echo_trt.backends.tensorrt.graph import name_collectives
from echo_trt.backends.tensorrt.profiles import native_profiles, packed_profiles
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.manifest import SelfCheck, TensorRTFacts
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError
from echo_trt.models.roles import Role
from super_tree_attention.tensorrt_plugin import prepare_graph

LOG = "tensorrt.log"
AMPERE = 8.0  # least compute capability of our kernels, and of an engine for all cards; larger: fewer cards run it


def check_settings(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be built: no compiler, another precision, an unknown card."""
    engine = recipe.engine
    load_compiler(engine)
    check_precision(engine, "precision", recipe.precision)
    if recipe.draft.precision is not None:
        check_precision(engine, "draft.precision", recipe.draft.precision)
    check_capabilities(engine, recipe.compute_capability)
    if not COMPILERS[engine].builds_anywhere:
        check_card(compute_capability(cuda_device()))


def check_card(capability: str) -> None:
    """Refuse a card of a compute capability that the attention kernel does not compile for."""
    if float(capability) < AMPERE:
        raise UserError(
            f"compute capability {capability}: the attention kernel needs {AMPERE} or more; use --engine tensorrt-rtx."
        )


@dataclass(frozen=True)
class TensorRTBuild:
    """The settings that all networks of one build share; ``folder`` is the bundle's."""

    recipe: Recipe
    folder: Path
    timings: Path
    detail: TellPhase

    def facts(self) -> TensorRTFacts:
        engine = self.recipe.engine
        return TensorRTFacts(version=load_compiler(engine).__version__, capabilities=self._capabilities())

    def _capabilities(self) -> list[str]:
        engine, requested = self.recipe.engine, self.recipe.compute_capability
        if not COMPILERS[engine].builds_anywhere:
            return [compute_capability(cuda_device())]
        return list(requested) or [c for c in known_capabilities(engine) if float(c) >= AMPERE]

    def compile(self, role: Role, name: str, precision: str) -> tuple[str, SelfCheck | None]:
        """Write ``name``.engine, and check it where a card can run it, else its graph where a CPU can."""
        recipe, sizes = self.recipe, CallSizes.of(self.recipe)
        graph, engine = self.folder / f"{name}.onnx", self.folder / f"{name}.engine"
        native = recipe.engine == "tensorrt-rtx"
        if native:
            export_native(role, graph, precision, sizes.cache_rows)
        else:
            check_heads(role.network.config.head_dim, role.network.config.num_heads // role.network.config.num_kv_heads)
            export(in_precision(role, precision), graph)
            prepare_graph(graph, graph)
        ranks = role.network.config.ranks
        if ranks > 1:
            name_collectives(graph)
        check = _check_graph(role, graph, precision, sizes) if native else None
        profiles = (native_profiles if native else packed_profiles)(graph, sizes)
        targets = recipe.compute_capability if native else ()
        # The engine of one rank would wait for the other ranks.
        runs_here = ranks == 1 and has_cuda() and compute_capability(cuda_device()) in self._capabilities()
        job = CompileJob(recipe.engine, graph, profiles, targets, self.timings, self.folder / LOG, runs_here)
        compile_engine(job, engine, self.detail)
        for file in (graph, graph.with_name(graph.name + ".data")):  # the engine has the weights
            file.unlink(missing_ok=True)
        if runs_here:
            check = self._check_engine(role, engine, precision, sizes)
        return engine.name, check

    def _check_engine(self, role: Role, engine: Path, precision: str, sizes: CallSizes) -> SelfCheck:
        from echo_trt.backends.tensorrt.engine import TensorRTEngine

        def opened(blocks: int) -> TensorRTEngine:
            # A check makes two calls: the pool and the graphs of all sizes would take most of its time and memory.
            return TensorRTEngine.open(self.recipe.engine, engine, self.facts(), 1, sizes.blocks, blocks, prepare=False)

        check = check_engine(role, opened, precision, LINEAR_TABLE)
        torch.cuda.empty_cache()  # PyTorch keeps what the engine had, and TensorRT cannot take it
        return check


def _check_graph(role: Role, graph: Path, precision: str, sizes: CallSizes) -> SelfCheck | None:
    """Compare the native graph with the reference; None where ONNX Runtime is missing, or has no bf16."""
    if precision == "bf16" or importlib.util.find_spec("onnxruntime") is None:
        return None
    from echo_trt.backends.onnxruntime import OnnxRuntimeEngine

    check = check_engine(role, lambda _: OnnxRuntimeEngine(graph, 1, sizes.blocks), precision, LINEAR_TABLE)
    return check.model_copy(update={"of": "graph"})
