"""The self-check of a build: compares the compiled engine with the reference, on a prompt and on a tree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.manifest import SelfCheck
from echo_trt.decoding.pack import BlockShape, Packed, pack, pack_blocks
from echo_trt.decoding.super_tree import SuperTree, ancestor_mask
from echo_trt.errors import UserError
from echo_trt.models.block_config import BlockConfig
from echo_trt.models.roles import BlockRole, HeadRole, Role

#: Error allowed, as a share of the largest logit; larger: worse engines pass. bf16 in PyTorch is 0.07 off for the
#: default pair.
BOUNDS = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1, "int8": 0.2}
PROMPT, BLOCKS = 45, 4
CONTEXT = 20  # cached context rows of a block; larger: fewer rows of a block fit behind them
#: The request's KV blocks: scattered over the pool, or those of the first slot in a linear engine.
SCATTERED_TABLE, LINEAR_TABLE = (2, 0, 3), (0, 1, 2)


def check_engine(
    role: Role, compiled: Callable[[int], Engine], precision: str, blocks: tuple[int, ...] = SCATTERED_TABLE
) -> SelfCheck:
    """Compare both engines on a prompt, then on a tree over it; ``compiled`` takes a number of KV blocks."""
    engines = [TorchEngine(role, BLOCKS), compiled(BLOCKS)]
    rng = np.random.default_rng(0)
    table = np.array([blocks], np.int32)
    vocab = role.network.config.vocab_size
    if isinstance(role, BlockRole):
        return _judged(*(_compare_blocks(engines, role, table, past) for past in (0, CONTEXT)), precision)
    rows, empty = np.arange(PROMPT), np.zeros(1, np.int64)
    prompt = pack(rng.integers(0, vocab, PROMPT), rows, empty, np.array([PROMPT]), table, rows)
    tree = SuperTree.from_roots(rng.integers(0, vocab, 1))
    for parent in (0, 0, 1, 1, 2, 3):
        tree.add(np.array([parent]), rng.integers(0, vocab, 1), np.zeros(1))
    past, size = np.array([PROMPT]), np.array([len(tree)])
    branch = pack(tree.token, PROMPT + tree.depth, past, size, table, np.arange(len(tree)), ancestor_mask(tree))
    return _judged(*(_compare(engines, role, call) for call in (prompt, branch)), precision)


def _judged(prompt: tuple[float, float], tree: tuple[float, float], precision: str) -> SelfCheck:
    """Refuse an engine whose errors on a prompt or a tree, each with its share of equal best tokens, are too large."""
    (prompt_error, same), (tree_error, _) = prompt, tree
    check = SelfCheck(prompt_error=prompt_error, tree_error=tree_error, bound=BOUNDS[precision], same_argmax=same)
    if not max(prompt_error, tree_error) <= check.bound:
        raise UserError(
            f"self-check failed: the {precision} engine is {max(prompt_error, tree_error):.2g} of the largest logit "
            f"off the reference, and {check.bound} is allowed; build with --precision fp32."
        )
    return check


def worst(first: SelfCheck | None, second: SelfCheck | None) -> SelfCheck | None:
    """Merge two ranks' checks into one of the worse figures."""
    if first is None or second is None:
        return first or second
    return SelfCheck(
        prompt_error=max(first.prompt_error, second.prompt_error),
        tree_error=max(first.tree_error, second.tree_error),
        bound=first.bound,
        same_argmax=min(first.same_argmax, second.same_argmax),
        of=first.of,
    )


def block_shape(config: BlockConfig) -> BlockShape:
    """Return the rows of a drafter's pass."""
    return BlockShape(config.block_size, config.mask_token, not config.causal, config.anchored)


def _compare_blocks(engines: list[Engine], role: BlockRole, table: np.ndarray, past: int) -> tuple[float, float]:
    """Compare a block behind ``past`` cached context rows and a new one; see ``_compare``."""
    rng, config = np.random.default_rng(1), role.network.config
    tokens = rng.integers(0, config.vocab_size, past + 1)
    features = rng.standard_normal((past + 1, config.feature_size)).astype(np.float32)
    if past:
        rows, none = np.arange(past), np.zeros(1, np.int64)
        call = pack(tokens[:past], rows, none, np.array([past]), table, np.zeros(0))
        for engine in engines:
            engine.run(call, features=features[:past], state_rows=rows)
    one = np.ones(1, np.int64)
    call, states = pack_blocks(block_shape(config), tokens[past:], past * one, one, tokens[past:], table)
    return _differences([engine.run(call, features=features[past:], state_rows=states) for engine in engines])


def _compare(engines: list[Engine], role: Role, call: Packed) -> tuple[float, float]:
    """Return the largest error over the largest value of the first output, and the share of equal best tokens."""
    inputs = {}
    if isinstance(role, HeadRole):
        rng, config = np.random.default_rng(1), role.network.config
        count = len(call.token_ids)
        split = count // 2
        inputs["features"] = rng.standard_normal((split, 3 * config.target_hidden_size)).astype(np.float32)
        inputs["hidden"] = rng.standard_normal((count - split, config.hidden_size)).astype(np.float32)
    return _differences([engine.run(call, **inputs) for engine in engines])


def _differences(outputs: list[dict[str, np.ndarray]]) -> tuple[float, float]:
    """Compare what two engines put out: see ``_compare``."""
    want, got = outputs
    first = "logits" if "logits" in want else "scores"
    best, same = (o["logits"].argmax(1) if "logits" in o else o["candidates"][:, 0] for o in (want, got))
    error = np.abs(want[first] - got[first]).max() / np.abs(want[first]).max()
    return float(error), float((best == same).mean())
