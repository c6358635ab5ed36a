"""Drive a loop by hand: run it, look at what it asks of its engines, draft for it what will be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pairs import VOCAB

from echo_trt.backends.base import Engine
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.eagle3 import Drafter
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.engine.tuning import sources
from echo_trt.speculation.drafts import TimedDraft
from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.planner import Iteration
from echo_trt.speculation.policies import goodput_settings
from echo_trt.speculation.super_tree import SuperTree

SPECULATION_PAYS = Costs(Curve([1, 256], [1e-3, 1.001e-3]), Curve([1, 256], [1e-9] * 2))


def machine(each: float = 0.0, draft: float = 0.0) -> Costs:
    """Make the costs of a further verified token and of a draft pass, in passes of one token."""
    return Costs(Curve([1, 256], [1e-3, 1e-3 * (1 + 255 * each)]), Curve([1, 256], [1e-9 + 1e-3 * draft] * 2))


def prompt_ids(length: int, seed: int) -> list[int]:
    """Random tokens, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def add(loop: EngineCore, prompt: Sequence[int], **params) -> Request:
    request = Request("r", np.asarray(prompt), SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **params}))
    loop.scheduler.add(request)
    return request


def run(loop: EngineCore, steps: int = 100_000) -> list[tuple[Request, list[int]]]:
    """Up to ``steps`` iterations; returns what was emitted."""
    events = []
    for _ in range(steps):
        if not loop.scheduler.busy:
            break
        events += loop.step()
    return events


def echo_planner(**settings) -> EchoPlanner:
    return EchoPlanner("echo", EchoSettings(**{"per_request": 64, **settings}))


class _OnMachine(GoodputPlanner):
    """A planner to which passes take what its costs say, however busy this machine is."""

    def observe(self, iteration: Iteration) -> None:
        super().observe(self.clocked(iteration))

    def clocked(self, iteration: Iteration) -> Iteration:
        costs, target = self.costs, iteration.target
        drafts = tuple(replace(each, seconds=costs.draft(each.tokens, each.context)) for each in iteration.drafts)
        target = replace(target, seconds=costs.target(target.tokens, target.context))
        seconds = target.seconds + sum(each.seconds for each in drafts)
        parts = {"target": target, "drafts": drafts, "seconds": seconds, "planning": 0.0, "host": 0.0}
        return replace(iteration, **parts)


def goodput_planner(
    llm: LLM, costs: Costs, policy: str = "goodput", ngrams: NGrams | None = None, clock: bool = True
) -> GoodputPlanner:
    """Return a goodput policy's planner for a machine of ``costs``, not this one, so that it speculates as a test
    wants.

    Without a ``clock`` it learns what passes take here.
    """
    networks = replace(llm.networks, ngrams=ngrams)
    settings = goodput_settings(policy, llm.manifest.recipe.decoding.model_dump())
    acceptance = Acceptance.uncalibrated(settings.max_depth)
    head = llm.networks.drafter is not llm.networks.copier
    kind, slots = _OnMachine if clock else GoodputPlanner, networks.batch.count
    extra = {
        "block": getattr(llm.networks.drafter, "block", 0),
        "chain_alone": networks.target.rounds_trees,
    }
    found = sources(networks, settings, acceptance)
    return kind(policy, settings, costs, acceptance, slots, found, head, **extra)


def assert_all_free(loop: EngineCore) -> None:
    batch = loop.batch
    assert not loop.scheduler.busy
    assert not batch.active.any()
    assert batch.blocks.used == 0
    assert batch.blocks.free + batch.blocks.cached == loop.target.num_blocks
    assert not batch.blocks.held.any()


class Counted(Engine):
    """An engine, and the calls that were made to it."""

    def __init__(self, engine: Engine):
        self._engine, self.num_blocks = engine, engine.num_blocks
        self.calls: list[ForwardBatch] = []
        self.moves: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append(call)
        return self._engine.run(call, **inputs)

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        self.moves.append((source, target))
        self._engine.compact_kv(source, target)


class Foresight(Drafter):
    """A drafter that knows how each text goes on and hides the next token among decoys, at a rank that changes."""

    scores = np.log([0.4, 0.25, 0.2, 0.15])

    def __init__(self, batch: InputBatch, texts: Sequence[Sequence[int]], vocabulary: int = VOCAB):
        """``texts`` are whole: prompts and what follows them. Decoys are tokens of the ``vocabulary``."""
        self.batch, self.texts, self.vocabulary = batch, [np.asarray(text) for text in texts], vocabulary

    def draft_lag(self, slots: np.ndarray) -> np.ndarray:
        return np.ones(len(slots), np.int64)

    def begin(self, slots: np.ndarray) -> ForesightDraft:
        return ForesightDraft([self._text_of(slot) for slot in slots], self.vocabulary)

    def _text_of(self, slot: int) -> np.ndarray:
        length = self.batch.length[slot]
        begin = self.batch.tokens[slot, :length]
        return next(t for t in self.texts if len(t) >= length and (t[:length] == begin).all())[length:]

    def observe(self, *_: object) -> None:
        pass

    def forget(self, slot: int) -> None:
        pass


class ForesightDraft(TimedDraft):
    def __init__(self, rest: list[np.ndarray], vocabulary: int):
        super().__init__()
        self._rest, self._vocabulary = rest, vocabulary

    def propose_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._children(requests, np.zeros(len(requests), np.int64))

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._children(tree.request[nodes], tree.depth[nodes])

    def _children(self, requests: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = Foresight.scores
        tokens = np.empty((len(requests), len(scores)), np.int64)
        for row, request, position in zip(tokens, requests, depth, strict=True):
            rest = self._rest[request]
            truth = int(rest[position]) if position < len(rest) else 0
            row[:] = (truth + np.arange(len(row)) - truth % len(row)) % self._vocabulary
        return np.tile(scores, (len(requests), 1)), tokens
