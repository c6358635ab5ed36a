"""The memory that a recipe needs on every GPU, and the disk that its build does."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from echo_trt.backends.cuda.sizes import LARGEST
from echo_trt.backends.kind import engine_kind
from echo_trt.backends.states import KEPT
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.engine.host_memory import gigabytes
from echo_trt.engine.kv_pool import kept_features
from echo_trt.errors import UserError
from echo_trt.sizing.graphs import Reserved, reserved
from echo_trt.sizing.networks import KV_BYTES, Sizes
from echo_trt.sizing.shapes import shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import POLICIES
from super_tree_attention.kernel_plan import split_rows

FP8_FROM = 8.9  # compute capability of the first cards that multiply in FP8: Ada and Hopper


@dataclass(frozen=True)
class Needs:
    """Bytes on one GPU, and blocks of 32 tokens of the KV pool.

    calls           sizes of the calls for which engines are made
    tokens          of the largest call
    working         bytes of activations, logits and scratch memory
    reserved        bytes that CUDA graphs and the like take before requests come
    features_token  bytes of a token's features, which a draft reads and the card keeps beside the KV pool
    request_blocks  the most blocks of one request
    states          bytes of recurrent layers' states, of all running requests and in the prefix cache
    """

    target_weights: int
    draft_weights: int
    target_kv_token: int
    draft_kv_token: int
    features_token: int
    calls: CallSizes
    tokens: int
    working: int
    reserved: Reserved
    blocks: int
    request_blocks: int
    states: int = 0

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
        return self.target_weights + self.draft_weights + self.working + self.reserved.total + self.states


def recipe_needs(recipe: Recipe, folder: Path) -> Needs:
    """Compute the needs of a recipe, of ``folder``. Raises UserError where a checkpoint's shape is not known."""
    target, draft = shapes(recipe, folder)
    return needs(recipe, target.sizes, draft and draft.sizes)


def check_space(recipe: Recipe, recipe_folder: Path, folder: Path) -> None:
    """Refuse a build whose files, the engines of all ranks and the graph of one, would fill the disk of ``folder``."""
    need = recipe_needs(recipe, recipe_folder)
    needed = need.target_weights * (recipe.tensor_parallel + 1) + need.draft_weights
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the build writes about {gigabytes(needed)} into {folder.parent}, where {gigabytes(free)} are free; free "
            f"{gigabytes(needed - free)} more there, or name a folder on another disk with -o."
        )


def computed_on(recipe: Recipe, capability: str) -> Recipe:
    """Return the recipe as a card computes it: in bf16 where its matrices in FP8 are dequantised."""
    fp8 = recipe.precision == "fp8" and float(capability) < FP8_FROM
    return recipe.model_copy(update={"precision": "bf16"}) if fp8 else recipe


def needs(recipe: Recipe, target: Sizes, draft: Sizes | None) -> Needs:
    """Compute the needs of one GPU; ``target`` is its share (Sizes.gpus)."""
    calls, on_card = CallSizes.of(recipe), engine_kind(recipe.engine).card is not None
    draft_precision = recipe.draft_precision
    copies = KEPT * recipe.limits.prefix_cache
    tokens = max(calls.rows, calls.chunk) + calls.chunk  # all rows of logits, and a chunk beside them
    return Needs(
        target_weights=int(target.weight_bytes(recipe.precision)),
        draft_weights=int(draft.weight_bytes(draft_precision)) if draft else 0,
        target_kv_token=target.kv_values * KV_BYTES[recipe.precision],
        draft_kv_token=draft.kv_values * KV_BYTES[draft_precision] if draft else 0,
        features_token=kept_features(recipe.engine, draft) * KV_BYTES[draft_precision] if draft and on_card else 0,
        calls=calls,
        tokens=tokens,
        working=_working(recipe, target, tokens) + split_scratch(target, tokens) + _drafting(recipe, draft),
        reserved=reserved(recipe, target, draft, calls),
        blocks=calls.pool,
        request_blocks=calls.blocks,
        states=4 * (target.states.values * calls.batch * (1 + copies) + target.states.row * tokens),
    )


def _working(recipe: Recipe, target: Sizes, tokens: int) -> int:
    """Estimate bytes of fp32 logits and of one layer's activations, of which a compiler keeps a few alive at once."""
    gated, outputs = 3 * target.intermediate_size // target.gpus, target.experts * target.hidden_size
    if target.experts and engine_kind(recipe.engine).chosen:  # others keep the outputs of all before they sum them
        gated, outputs = (size * target.experts_per_token // target.experts for size in (gated, 2 * outputs))
    layer = 6 * target.hidden_size + gated + outputs
    return tokens * (target.vocab_size * 4 + layer * KV_BYTES[recipe.precision])


def _drafting(recipe: Recipe, draft: Sizes | None) -> int:
    """Estimate bytes of a draft's largest pass, which keeps logits in fp32, too, and their exponentials.

    A head drafts its last level for all requests at once.
    """
    card = engine_kind(recipe.engine).card
    if draft is None or card is None or not card.drafts_apart:
        return 0
    batch, value = recipe.limits.batch, KV_BYTES[recipe.draft_precision]
    logits = draft.vocab_size * (value + 2 * 4)
    if not draft_kind(recipe.draft.kind).levels:
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
