"""What the package knows of an engine: one record in its folder, found by the entry points ``echo_trt.engines``.

A record costs no import of its engine's libraries: its functions import them when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from echo_trt.backends.base import Engine
from echo_trt.bundle.manifest import Manifest
from echo_trt.bundle.recipe import Recipe
from echo_trt.files.extras import ENGINES, extra, registered

#: Modules of the extra "torch", which networks in PyTorch need.
TORCH = ("safetensors", "torch", "transformers")

if TYPE_CHECKING:  # it imports PyTorch
    from echo_trt.models.roles import Role

#: Opens a network's file, of a precision, with a pool of KV blocks, for calls within bounds, and with
#: ``Manifest.engine_facts``; with a ``group`` (``backends.parallel``) as a rank of it. It must be picklable.
OpenFile = Callable[..., Engine]
#: Takes how far a build's stage is, from 0 to 1, and its phase.
Detail = Callable[[float, str], None]


@dataclass(frozen=True)
class CompiledRole:
    """What a compiler made of a role.

    file     its name in the bundle
    open     opens the file with a number of KV blocks, for the self-check; None: it cannot run here by itself
    longest  tokens of one call at most; None: any number
    layers   how many of the network's first layers ``open`` has; None: all
    """

    file: str
    open: Callable[[int], Engine] | None
    longest: int | None = None
    layers: int | None = None


#: Compiles a role, under a name, in a precision.
Compile = Callable[["Role", str, str], CompiledRole]


@dataclass(frozen=True)
class OnCard:
    """What an engine takes of a GPU beside weights, KV pool and activations.

    layer_nodes        kernels of one layer in a CUDA graph. An estimate: a compiler merges small kernels
    context_bytes      of a graph's context without its scratch memory, an estimate; 0: graphs have none
    told_trees         whether the engine is told how large trees are, and captures no larger sizes for them
    drafts_apart       whether a draft's passes take memory beside the target's
    projects_features  where a draft's projection is computed of a token's features, which is what is kept then:
                       "target", by the target's graph; "cache", when they are kept; "draft", not before they are read
    """

    layer_nodes: int
    context_bytes: int = 0
    told_trees: bool = False
    drafts_apart: bool = False
    projects_features: Literal["target", "cache", "draft"] = "draft"


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """An engine's record.

    precisions   of recipes that it is built in
    card         its use of a GPU; None: it runs on a CPU alone
    host         whether it runs on a CPU; one that has a ``card``, too, does where there is no GPU
    preference   the engine with the highest one that suits a machine, and refuses nothing of a recipe, is taken for
                 it where nobody names one; and why, in a phrase
    runs_here    tells whether this machine's host has what it needs
    states       whether it keeps the states of recurrent layers
    chosen       whether it computes a token's chosen experts of a mixture alone
    blocks       precisions in which it takes matrices in a file's blocks of few bits as they are
    divides      whether it divides a target among GPUs
    fixed_pool   whether the KV pool's size is compiled in
    tools        packages whose versions a bundle states
    modules      that opening a bundle imports, and an installation of echo-trt alone lacks
    extra        of echo-trt, which brings them
    kept         files of a bundle that the next build of it goes on from
    check        refuses a recipe that this machine cannot build
    compiler     makes the compiler of a recipe's networks into a folder, and ``Manifest.engine_facts``
    value_bytes  returns the bytes of a KV value, in a precision, here
    computes_in  returns the precision that one is computed in here
    """

    name: str
    precisions: tuple[str, ...]
    open: OpenFile
    compiler: Callable[[Recipe, Path, Detail], tuple[Compile, dict[str, Any]]]
    card: OnCard | None = None
    host: bool = True
    preference: tuple[int, str] = (0, "no other engine builds this")
    runs_here: Callable[[], bool] = lambda: True
    states: bool = False
    chosen: bool = False
    blocks: tuple[str, ...] = ()
    divides: bool = False
    fixed_pool: bool = False
    tools: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    extra: str = ""
    kept: tuple[str, ...] = ()
    check: Callable[[Recipe], None] = lambda recipe: None
    value_bytes: Callable[[str], int] = lambda precision: 4 if precision == "fp32" else 2
    computes_in: Callable[[str], str] = lambda precision: precision

    @property
    def on_host(self) -> bool:
        """Whether its KV pool is in the memory of the host, on this machine."""
        return self.host and not (self.card and _has_gpu())

    @property
    def suits(self) -> bool:
        """Whether recipes for it suit this machine."""
        return self.runs_here() and (self.card is None or _has_gpu())


def _has_gpu() -> bool:
    from echo_trt.backends.cuda.device import has_cuda

    return has_cuda()


def engine_kind(name: str) -> EngineKind:
    """Return the record of an engine. Raises UserError where it is not installed."""
    kind: EngineKind = extra(ENGINES, name)
    return kind


def engine_kinds() -> list[EngineKind]:
    """Return the records of all installed engines, by name."""
    return [engine_kind(name) for name in registered(ENGINES)]


def built_as(recipe: Recipe, engine: str | None, precision: str | None) -> Recipe:
    """Return the recipe with the build settings that are given.

    A draft's precision was chosen for the recipe's engine; with another engine the draft takes the target's. A KV pool
    was chosen for a GPU's memory, so on a CPU it follows the machine's.
    """
    given = {"engine": engine, "precision": precision}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value}
    if engine not in (None, recipe.engine):
        changes["draft"] = recipe.draft.model_copy(update={"precision": None})
        if engine_kind(engine).card is None:
            changes["limits"] = recipe.limits.model_copy(update={"kv_blocks": None})
    return recipe.model_copy(update=changes)


def computes_in(manifest: Manifest) -> str:
    """Return the precision in which a bundle is computed here: its own, or what takes its place on this machine."""
    return engine_kind(manifest.engine).computes_in(manifest.precision)
