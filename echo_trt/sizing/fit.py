"""The memory that a recipe needs on every GPU, and its fit on a card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from echo_trt.backends.cuda.sizes import LARGEST, CallBounds, capacity_of, graph_sizes
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.host_memory import gigabytes
from echo_trt.engine.kv_pool import kept_features
from echo_trt.errors import UserError
from echo_trt.sizing.cards import CARDS, RTX_CAPABILITIES, Card, knee
from echo_trt.sizing.networks import KV_BYTES, WEIGHT_BYTES, Sizes
from echo_trt.sizing.shapes import shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import POLICIES
from super_tree_attention.kernel_plan import split_rows

#: Kernels of one layer by engine, and of what is around the layers. Estimates: a compiler merges small kernels.
LAYER_NODES, GRAPH_NODES = {"torch": 26, "tensorrt": 10, "tensorrt-rtx": 10}, 20
SLOT_GRAPHS = 64  # graphs of an engine with a cache per slot, which are captured as calls come
NODE_BYTES = 6144  # of device memory, a kernel in a graph; an estimate: larger is safer, and leaves fewer KV blocks


@dataclass(frozen=True)
class Needs:
    """Bytes on one GPU, and blocks of 32 tokens of the KV pool.

    calls           sizes of the calls for which engines are made
    tokens          of the largest call
    working         bytes of activations, logits and scratch memory
    graphs          bytes of captured CUDA graphs, of target and draft
    features_token  bytes of a token's features, which a draft reads and the card keeps beside the KV pool
    request_blocks  the most blocks of one request
    contiguous      whether a running request has a cache for the whole context, whatever limits.kv_blocks is
    """

    target_weights: int
    draft_weights: int
    target_kv_token: int
    draft_kv_token: int
    features_token: int
    calls: CallSizes
    tokens: int
    working: int
    graphs: int
    blocks: int
    request_blocks: int
    contiguous: bool

    @property
    def kv_token(self) -> int:
        return self.target_kv_token + self.draft_kv_token

    @property
    def pool(self) -> int:
        return self.blocks * BLOCK * self.kv_token

    @property
    def features(self) -> int:
        """Bytes of the features of all the pool's tokens."""
        return self.blocks * BLOCK * self.features_token

    @property
    def block(self) -> int:
        """Bytes of a KV block and of its tokens' features."""
        return BLOCK * (self.kv_token + self.features_token)

    @property
    def fixed(self) -> int:
        """Bytes of everything but the pool and the features of its tokens."""
        return self.target_weights + self.draft_weights + self.working + self.graphs

    def max_blocks(self, card: Card) -> int:
        """Return how many blocks fit on a card; negative where the memory beside the pool does not fit."""
        return (card.usable - self.fixed) // self.block


def needs(recipe: Recipe, target: Sizes, draft: Sizes | None) -> Needs:
    """Compute the needs of one GPU; ``target`` is its share (Sizes.gpus)."""
    calls, contiguous, on_card = CallSizes.of(recipe), recipe.engine == "tensorrt-rtx", recipe.engine != "openvino"
    draft_precision = recipe.draft.precision or recipe.precision
    slot_blocks = calls.cache_rows / BLOCK if contiguous else calls.blocks
    # Linear: the padded trees of all slots. Paged: all rows of logits, and a chunk beside them.
    tokens = max(calls.batch * calls.tree, calls.chunk) if contiguous else max(calls.rows, calls.chunk) + calls.chunk
    rows = max(calls.rows, calls.chunk) if contiguous else tokens
    scratch = 0 if contiguous else split_scratch(target, tokens)
    return Needs(
        target_weights=target.stored * WEIGHT_BYTES[recipe.precision],
        draft_weights=draft.stored * WEIGHT_BYTES[draft_precision] if draft else 0,
        target_kv_token=target.kv_values * KV_BYTES[recipe.precision],
        draft_kv_token=draft.kv_values * KV_BYTES[draft_precision] if draft else 0,
        features_token=kept_features(recipe.engine, draft) * KV_BYTES[draft_precision] if draft and on_card else 0,
        calls=calls,
        tokens=tokens,
        working=_working(recipe, target, tokens, rows) + scratch + _drafting(recipe, draft),
        graphs=sum(graph_bytes(recipe.engine, network, calls) for network in (target, draft) if network),
        blocks=math.ceil(calls.batch * slot_blocks) if contiguous else calls.pool,
        request_blocks=math.ceil(slot_blocks),
        contiguous=contiguous,
    )


def _working(recipe: Recipe, target: Sizes, tokens: int, rows: int) -> int:
    """Estimate bytes of fp32 logits and of one layer's activations, of which a compiler keeps a few alive at once."""
    layer = 6 * target.hidden_size + 3 * target.intermediate_size // target.gpus
    if target.experts:  # the exported graph keeps the outputs of all experts before it sums them
        layer += target.experts * target.hidden_size
    return rows * target.vocab_size * 4 + tokens * layer * KV_BYTES[recipe.precision]


def _drafting(recipe: Recipe, draft: Sizes | None) -> int:
    """Estimate bytes of a draft's largest pass in PyTorch, which keeps logits in fp32, too, and their exponentials.

    A head drafts its last level for all requests at once. TensorRT's launches are no larger than the target's.
    """
    if draft is None or recipe.engine != "torch":
        return 0
    batch, value = recipe.limits.batch, KV_BYTES[recipe.draft.precision or recipe.precision]
    logits = draft.vocab_size * (value + 2 * 4)
    if recipe.draft.kind != "eagle3":
        return LARGEST * logits
    decoding = recipe.decoding.model_dump()
    trees = [policy.shape(decoding) for policy in POLICIES.values() if policy.shape]
    nodes = max(min(tree.beams, tree.width) * (tree.max_depth - 1) for tree in trees)
    rows = max(batch * max(min(tree.beams, tree.width) for tree in trees), LARGEST)
    tokens = max(batch * nodes, LARGEST)  # the largest graph's, however few requests there are
    layer = (6 * draft.hidden_size + 3 * draft.intermediate_size) * value
    return rows * logits + tokens * layer + split_scratch(draft, tokens)


def split_scratch(target: Sizes, tokens: int) -> int:
    """Compute the bytes that the attention kernel's splits leave for their merge, in one layer of ``tokens`` tokens."""
    rows = split_rows(tokens, target.num_heads // target.gpus)
    return rows * (target.head_dim + 1) * 4  # a mean and the log of its sum, in float32


def graph_bytes(engine: str, network: Sizes, calls: CallSizes) -> int:
    """Estimate the bytes of a network's captured graphs: the driver's nodes, and the buffers of their inputs."""
    if engine not in LAYER_NODES:
        return 0
    nodes = GRAPH_NODES + LAYER_NODES[engine] * network.num_layers
    if engine == "tensorrt-rtx":
        return SLOT_GRAPHS * nodes * NODE_BYTES
    # A TensorRT engine is not told how large trees are, and captures some sizes more.
    sizes = graph_sizes(calls.batch, calls.tree) if engine == "torch" else graph_sizes(calls.batch)
    bounds = CallBounds(calls.batch, calls.blocks)
    buffers = sum(sum(capacity_of(size, bounds).values()) for size in sizes)
    return len(sizes) * nodes * NODE_BYTES + buffers


@dataclass(frozen=True)
class CardFit:
    """The fit of a recipe on ``count`` cards; ``spare``: bytes left on one GPU, negative where bytes are missing."""

    card: Card
    count: int
    spare: int
    max_blocks: int
    k_max: int
    k_max_routed: int | None  # of a mixture whose tokens are computed by their chosen experts alone
    fits: bool
    sentence: str


def fit(recipe: Recipe, folder: Path, card: Card, count: int) -> CardFit:
    """Fit a recipe, of ``folder``, on cards. UserError where a checkpoint's shape is not known."""
    target, draft = shapes(recipe, folder)
    need = needs(recipe, target.sizes, draft and draft.sizes)
    sizes, precision, gpus = target.sizes, recipe.precision, recipe.tensor_parallel
    spare = card.usable - need.fixed - need.pool - need.features
    compiled = recipe.engine != "tensorrt-rtx" or card.capability in RTX_CAPABILITIES
    if not compiled:
        sentence = f"TensorRT-RTX builds nothing for compute capability {card.capability}; use engine tensorrt."
    elif spare < 0:
        missing = gigabytes(-spare)
        sentence = f"does not fit: {missing} a GPU are missing; {_remedy(recipe, folder, need, card, count)}."
    elif count < gpus:
        sentence = f"does not fit: tensor_parallel is {gpus}, but there are {count} cards; take {gpus}."
    else:
        sentence = f"fits: {gigabytes(spare)} a GPU are left, {_room(need, card)}."
    return CardFit(
        card=card,
        count=count,
        spare=spare,
        max_blocks=need.max_blocks(card),
        k_max=knee(sizes.network(precision, routed=False), card.chip),
        k_max_routed=knee(sizes.network(precision), card.chip) if sizes.experts else None,
        fits=compiled and spare >= 0 and count >= gpus,
        sentence=sentence,
    )


def _room(need: Needs, card: Card) -> str:
    maximum = need.max_blocks(card)
    return (
        f"room for limits.batch {maximum // need.request_blocks:,}"
        if need.contiguous
        else f"room for {maximum:,} KV blocks"
    )


def _remedy(recipe: Recipe, folder: Path, need: Needs, card: Card, count: int) -> str:
    """Name the limit to lower, or another remedy where no limit helps."""
    limits, maximum = recipe.limits, need.max_blocks(card)
    if maximum >= need.request_blocks:
        if need.contiguous:
            return f"lower limits.batch from {limits.batch} to {maximum // need.request_blocks}"
        now = f"from {limits.kv_blocks:,}" if limits.kv_blocks else f"({need.blocks:,}, as many as the batch needs)"
        return f"lower limits.kv_blocks {now} to {maximum:,}"
    context = maximum * BLOCK - (need.request_blocks * BLOCK - limits.context)
    if context >= limits.prefill_chunk:
        pool = "limits.batch to 1" if need.contiguous else f"limits.kv_blocks to {maximum:,}"
        return f"lower limits.context from {limits.context:,} to {context:,} and {pool}"
    return f"weights and working memory take {gigabytes(need.fixed)} of {gigabytes(card.usable)}; " + _more_cards(
        recipe, folder, card, count
    )


def _more_cards(recipe: Recipe, folder: Path, card: Card, count: int) -> str:
    for gpus in (2, 4, 8):
        split = recipe.model_copy(update={"tensor_parallel": gpus})
        if _runs(split, folder, card):
            return f"set tensor_parallel to {gpus}" + ("" if gpus <= count else f" and take {gpus} cards")
    others = ", ".join(other.name for other in CARDS.values() if _runs(recipe, folder, other))
    return f"take a larger card ({others})" if others else "no card in the table holds it, so take a smaller model"


def _runs(recipe: Recipe, folder: Path, card: Card) -> bool:
    """Return whether one request has room; no, where this number of GPUs cannot share the network."""
    try:
        target, draft = shapes(recipe, folder)
    except UserError:
        return False
    need = needs(recipe, target.sizes, draft and draft.sizes)
    return need.max_blocks(card) >= need.request_blocks
