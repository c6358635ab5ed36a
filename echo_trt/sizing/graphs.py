"""Memory of a GPU that CUDA graphs, their contexts, a head's states and the sampler take, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from echo_trt.backends.cuda.calls import MAX_GRAPHS
from echo_trt.backends.cuda.sizes import LARGEST, CallBounds, bucket, capacity_of, graph_sizes
from echo_trt.backends.kind import OnCard, engine_kind
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.engine.host_memory import gigabytes
from echo_trt.engine.tuning import USUAL_GATES
from echo_trt.sizing.networks import KV_BYTES, Sizes
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import echo_settings

GRAPH_NODES = 20  # kernels around the layers, an estimate
FP8_NODES = 4  # more kernels of a layer in FP8: each product's input is quantised
LEVEL_NODES = 45  # kernels of one level of a head's draft
NODE_BYTES = 6144  # of device memory, a kernel in a graph; an estimate: larger is safer, and leaves fewer KV blocks
SAMPLER_BYTES = 512 << 20  # of tokens that are chosen at once (cuda/device_rows.py, cuda/choose.py)


@dataclass(frozen=True)
class Reserved:
    """Bytes of one GPU that are taken before requests come, beside weights, KV pool and the largest call.

    target    CUDA graphs of the target: a graph per padded size, with its nodes and its inputs
    draft     those of the draft
    levels    those of a head's drafts of several levels: a graph per batch size and number of levels
    contexts  of a compiler, one per graph
    states    of the nodes that a head drafts in one iteration
    sampler   of tokens that are chosen at once
    """

    target: int = 0
    draft: int = 0
    levels: int = 0
    contexts: int = 0
    states: int = 0
    sampler: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def sentence(self) -> str:
        """Name the parts with their bytes, the graphs' by their networks."""
        graphs = ("target", "draft", "levels")
        parts = {
            f"graphs of the {name}" if name in graphs else name: taken for name, taken in asdict(self).items() if taken
        }
        return ", ".join(f"{name} {gigabytes(taken)}" for name, taken in parts.items())


def reserved(recipe: Recipe, target: Sizes, draft: Sizes | None, calls: CallSizes) -> Reserved:
    """Estimate what an engine reserves on one GPU; nothing on a CPU."""
    card = engine_kind(recipe.engine).card
    if card is None:
        return Reserved()
    sizes = graph_sizes(calls.batch, calls.tree) if card.told_trees else graph_sizes(calls.batch)
    bounds = CallBounds(calls.batch, calls.blocks)
    inputs = sum(sum(capacity_of(size, bounds).values()) for size in sizes)
    fp8 = FP8_NODES * target.num_layers if recipe.precision == "fp8" else 0
    head = draft is not None and draft_kind(recipe.draft.kind).levels
    levels, count = _levels(recipe, calls.batch) if head else (0, 0)
    nodes = min(calls.batch * (calls.tree + 1), calls.pool * BLOCK)
    return Reserved(
        target=len(sizes) * (_nodes(card, target) + fp8) * NODE_BYTES + inputs,
        draft=len(sizes) * _nodes(card, draft) * NODE_BYTES + inputs if draft else 0,
        levels=levels * LEVEL_NODES * NODE_BYTES,
        contexts=((1 + bool(draft)) * len(sizes) + count) * card.context_bytes,
        states=nodes * draft.hidden_size * KV_BYTES[recipe.draft_precision] if draft and head else 0,
        sampler=SAMPLER_BYTES,
    )


def _nodes(card: OnCard, network: Sizes) -> int:
    """Return the kernels of one graph of a network's pass."""
    return GRAPH_NODES + card.layer_nodes * network.num_layers


def _levels(recipe: Recipe, batch: int) -> tuple[int, int]:
    """Return how many levels all graphs of a head's drafts hold together, and the number of these graphs.

    They are of the policy that has the most, goodput, or echo with the largest budget.
    """
    decoding = recipe.decoding.model_dump()
    echo = echo_settings("echo", decoding | {"budget": LARGEST, "gates": decoding["gates"] or USUAL_GATES})
    padded = {count: min(bucket(count), batch) for count in range(1, batch + 1)}
    shapes = {(padded[count], shape) for count in padded for shape in echo.level_shapes(count)}
    of_goodput = [levels for _ in {*padded.values()} for levels in range(1, recipe.decoding.max_depth)]
    levels = max(of_goodput, [shape.levels for _, shape in shapes if shape.levels], key=sum)
    return sum(levels), min(len(levels), MAX_GRAPHS)
