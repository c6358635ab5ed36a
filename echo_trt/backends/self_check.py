"""The self-check of a build: compares the compiled engine with the reference, on prompts, a tree, and past a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch

from echo_trt.backends.base import Engine
from echo_trt.backends.first_layers import first_layers, in_blocks
from echo_trt.backends.kind import CompiledRole
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.manifest import SelfCheck
from echo_trt.errors import UserError
from echo_trt.models.config import BlockConfig
from echo_trt.models.roles import BlockModule, Role, TargetModule, feature_size
from echo_trt.models.weights import release_weights
from echo_trt.speculation.pack import BLOCK, BlockShape, ForwardBatch, pack, pack_blocks
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask

#: Error allowed, as a share of the largest logit; larger: worse engines pass. bf16 in PyTorch is 0.07 off for the
#: default pair.
BOUNDS = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1, "fp8": 0.2, "int8": 0.2, "int4": 0.2}
#: Rise allowed of a text's perplexity, by a target in few bits; larger: worse engines pass.
RISES = {"int8": 0.03, "int4": 0.03}
TREE_TIMES = 10  # as much of a tree's, whose few tokens are random; larger: worse engines pass
PROMPT, BLOCKS, CHAIN = 45, 4, 8
LONGEST_WINDOW = 1024  # tokens of a window whose end is checked; larger: more windows, and longer builds
CONTEXT = 20  # cached context rows of a block; larger: fewer rows of a block fit behind them
TEXTS, LENGTH = 8, 48  # of the text by which few bits are judged; larger: a steadier measure, and a longer build
TABLE = (2, 0, 3)  # the request's KV blocks, scattered over the pool


def check_compiled(role: Role, compiled: CompiledRole, precision: str) -> SelfCheck | None:
    """Check what was compiled of ``role``, whose weights leave the memory; None where that cannot run here."""
    if compiled.open is None:
        return None
    open_file, whole = compiled.open, role

    def opened(blocks: int) -> Engine:
        release_weights(whole)
        return open_file(blocks)

    text, few_bits = None, precision in RISES and isinstance(role, TargetModule)
    if in_blocks(role):  # which it shares with its file
        role = first_layers(role, compiled.layers or role.num_layers)
    elif few_bits:
        text = write_text(role)
    check = check_engine(role, opened, precision, text, compiled.longest or LONGEST_WINDOW)
    return check.model_copy(update={"layers": compiled.layers if role.num_layers < whole.num_layers else None})


def check_engine(
    role: Role,
    compiled: Callable[[int], Engine],
    precision: str,
    text: np.ndarray | None = None,
    longest: int = LONGEST_WINDOW,
) -> SelfCheck:
    """Compare both engines on a prompt, then on a tree over it, and then on a chain beyond a window.

    compiled  opens the engine with a number of KV blocks. The reference has run by then: ``compiled`` may take the
              role's weights out of memory, so that both need not fit side by side.
    text      int64 [texts, N] of the target: the prompts, by whose perplexity a target in few bits is judged
    longest   tokens of a window whose end is checked, which is a prompt of one call
    """
    calls = _calls(role, np.array([TABLE], np.int32), text)
    window = _window(role)
    if 0 < window <= min(longest, len(role.network.rotary.cos) - CHAIN):
        calls += _beyond(role, window)
    needed = max(BLOCKS, *(call.block_indices.max(initial=0) + 1 for call, _ in calls))
    expected = list(_runs(TorchEngine(role, needed), calls))
    projects = isinstance(role, TargetModule) and role.projection is not None
    engine, compare = compiled(needed), partial(_compare, projects) if text is None else _perplexity
    pairs = zip(calls, expected, _runs(engine, calls), strict=True)
    figures = [compare(want, got) for (call, _), want, got in pairs if len(call.logit_rows)]
    prompts = 1 if text is None else len(text)
    (prompt_error, same), (tree_error, _) = np.mean(figures[:prompts], axis=0), np.max(figures[prompts:], axis=0)
    prompt_error, same, tree_error = float(prompt_error), float(same), float(tree_error)
    bound = (BOUNDS if text is None else RISES)[precision]
    measure: Literal["logits", "perplexity"] = "logits" if text is None else "perplexity"
    check = SelfCheck(prompt_error=prompt_error, tree_error=tree_error, bound=bound, same_argmax=same, measure=measure)
    if not (check.error <= bound and (text is None or tree_error <= TREE_TIMES * bound)):
        reason = f"self-check failed: the {precision} engine has {check.sentence}"
        raise UserError(f"{reason}; build with another --precision or --engine.")
    return check


def _runs(engine: Engine, calls: list[CheckedCall]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs of ``calls``, whose tokens are committed."""
    for call, inputs in calls:
        outputs = engine.run(call, **inputs)
        yield {name: np.array(value) for name, value in outputs.items()}  # the next run overwrites
        engine.commit(np.arange(len(call.token_ids)), np.diff(call.seq_begins))


CheckedCall = tuple[ForwardBatch, dict[str, np.ndarray]]


def _calls(role: Role, table: np.ndarray, text: np.ndarray | None) -> list[CheckedCall]:
    """Make prompts, random or of ``text``, and a tree of random tokens over the last one, with a head's inputs."""
    if isinstance(role, BlockModule):
        return _block_calls(role, table)
    rng = np.random.default_rng(0)
    vocab = role.network.config.vocab_size
    text = rng.integers(0, vocab, (1, PROMPT)) if text is None else text
    rows, past, empty = np.arange(text.shape[1]), np.array(text.shape[1:]), np.zeros(1, np.int64)
    prompts = [pack(tokens, rows, empty, past, table, rows) for tokens in text]
    tree = SuperTree.from_roots(rng.integers(0, vocab, 1))
    # An engine may count the rows of a window, and so take a single path alone beyond it.
    for parent in range(6) if 0 < _window(role) < text.shape[1] + 7 else (0, 0, 1, 1, 2, 3):
        tree.add(np.array([parent]), rng.integers(0, vocab, 1), np.zeros(1))
    size = np.array([len(tree)])
    branch = pack(tree.token, past + tree.depth, past, size, table, np.arange(len(tree)), ancestor_mask(tree))
    return [(call, _head_inputs(role, call)) for call in (*prompts, branch)]


def _window(role: Role) -> int:
    """Return the most tokens that a layer with a window sees; 0: no layer has one."""
    return max((role.network.config.window_of(layer) for layer in range(role.num_layers)), default=0)


def _beyond(role: Role, window: int) -> list[CheckedCall]:
    """Make a prompt that fills the ``window``, and a chain behind it, whose tokens no longer see the first ones."""
    rng, rows, past = np.random.default_rng(2), np.arange(window), np.array([window])
    tokens = rng.integers(0, role.network.config.vocab_size, window + CHAIN)
    table, chain = np.arange(-(-len(tokens) // BLOCK))[None, ::-1].astype(np.int32), np.arange(CHAIN)
    prompt = pack(tokens[:window], rows, np.zeros(1, np.int64), past, table, np.zeros(0, np.int64))
    chained = pack(tokens[window:], past + chain, past, np.array([CHAIN]), table, chain)
    return [(call, _head_inputs(role, call)) for call in (prompt, chained)]


def _block_calls(role: BlockModule, table: np.ndarray) -> list[CheckedCall]:
    """Make a block behind one context row, then cached context rows, then a block behind them and a new one."""
    rng, config = np.random.default_rng(1), role.network.config
    tokens = rng.integers(0, config.vocab_size, CONTEXT + 1)
    features = rng.standard_normal((CONTEXT + 1, feature_size(role))).astype(np.float32)

    def block(past: int) -> CheckedCall:
        one, newest = np.ones(1, np.int64), slice(past, past + 1)
        call, states = pack_blocks(block_shape(config), tokens[newest], past * one, one, tokens[newest], table)
        return call, {"features": features[newest], "state_rows": states}

    rows = np.arange(CONTEXT)
    cached = pack(tokens[:CONTEXT], rows, np.zeros(1, np.int64), np.array([CONTEXT]), table, np.zeros(0))
    return [block(0), (cached, {"features": features[:CONTEXT], "state_rows": rows}), block(CONTEXT)]


def write_text(role: TargetModule) -> np.ndarray:
    """Let the network write texts, int64 [TEXTS, LENGTH], at temperature 1 from random tokens: none is needed."""
    rng, each, one, blocks = np.random.default_rng(0), np.arange(TEXTS), np.ones(TEXTS, np.int64), -(-LENGTH // BLOCK)
    engine, table = TorchEngine(role, TEXTS * blocks), np.arange(TEXTS * blocks).reshape(TEXTS, -1)
    tokens = rng.integers(0, role.network.config.vocab_size, (TEXTS, 1))
    for past in range(LENGTH - 1):
        logits = engine.run(pack(tokens[:, -1], past * one, past * one, one, table, each))["logits"]
        engine.commit(each, one)
        tokens = np.hstack((tokens, (logits + rng.gumbel(size=logits.shape)).argmax(1)[:, None]))
    return tokens


def block_shape(config: BlockConfig) -> BlockShape:
    return BlockShape(config.block_size, config.mask_token, not config.causal, config.anchored)


def _head_inputs(role: Role, call: ForwardBatch) -> dict[str, np.ndarray]:
    if "hidden" not in role.inputs:
        return {}
    rng, config = np.random.default_rng(1), role.network.config
    count = len(call.token_ids)
    split = count // 2
    return {
        "features": rng.standard_normal((split, feature_size(role))).astype(np.float32),
        "hidden": rng.standard_normal((count - split, config.hidden_size)).astype(np.float32),
    }


def _compare(projects: bool, want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the error over an output's largest value, of the first and projected ones, and best tokens' agreement."""
    first = "logits" if "logits" in want else "scores"
    got = got | {first: got[first][:, : want[first].shape[1]]}  # a reference may have the first ones alone
    best, same = (o["logits"].argmax(1) if "logits" in o else o["candidates"][:, 0] for o in (want, got))
    compared = (first, "features") if projects else (first,)
    error = max(np.abs(want[name] - got[name]).max() / np.abs(want[name]).max() for name in compared)
    return float(error), float((best == same).mean())


def _perplexity(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return how much the perplexity rises of what the first network writes, and the share of equal best tokens.

    That is the exponential of the KL divergence, less 1.
    """
    before, after = (torch.from_numpy(outputs["logits"]).log_softmax(dim=1).numpy() for outputs in (want, got))
    divergence = (np.exp(before) * (before - after)).sum(1).mean()
    return float(np.expm1(divergence)), float((before.argmax(1) == after.argmax(1)).mean())
