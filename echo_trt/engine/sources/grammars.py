"""Sources under grammars: what is forced costs no draft, and chains end where they are forbidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from echo_trt.engine.assemble import Networks
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.grammars import state_at
from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.speculation.chains import NO_CHAINS, Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, StepContext
from echo_trt.speculation.sources import GRAMMAR
from echo_trt.speculation.super_tree import SuperTree

FORCED = 0.97  # P(a forced token is accepted) before anything is learnt; larger: longer chains at first
LONGEST = 16  # tokens of a chain; larger: more time to look for them, rarely a longer one
WORTH = 0.1  # P(accept) of a leaf that is continued; larger: fewer are looked at


class GuidedSource(ChainSource):
    """A source whose chains end where requests' grammars forbid them, or after ``LONGEST``; none are below leaves."""

    def __init__(self, source: ChainSource, batch: InputBatch):
        self._source, self._batch = source, batch

    def forces(self, load: StepContext) -> bool:
        return self._source.forces(load)

    def propose(self, load: StepContext) -> Chains:
        chains, grammars = self._source.propose(load), self._batch.grammar[load.slots]
        if not grammars.any():
            return chains
        tokens = chains.tokens.copy()
        for row in np.flatnonzero(grammars[chains.above]):
            tokens[row, _allowed(grammars[chains.above[row]], tokens[row, :LONGEST]) :] = -1
        return replace(chains, tokens=tokens)

    def extend(self, tree: SuperTree, probability: np.ndarray, load: StepContext) -> Chains:
        constrained = self._batch.grammar[load.slots].astype(bool)
        if constrained.any():
            load = replace(load, max_draft_len=np.where(constrained, 0, load.max_draft_len))
        return self._source.extend(tree, probability, load)

    def observe(self, load: StepContext) -> None:
        self._source.observe(load)

    def dump(self) -> dict[str, np.ndarray]:
        return self._source.dump()

    def load(self, learnt: Mapping[str, np.ndarray]) -> None:
        self._source.load(learnt)


class GrammarSource(ChainSource):
    """Proposes, at no cost, what running requests' grammars force."""

    def __init__(self, networks: Networks, settings: GoodputSettings, acceptance: Acceptance):
        self._batch = networks.batch

    def forces(self, load: StepContext) -> bool:
        return bool(self._batch.grammar[load.slots].any())

    def propose(self, load: StepContext) -> Chains:
        grammars = self._batch.grammar[load.slots]
        requests = np.flatnonzero(grammars)
        return self._chains(requests, [grammars[i] for i in requests])

    def extend(self, tree: SuperTree, probability: np.ndarray, load: StepContext) -> Chains:
        """Return what is forced behind likely leaves."""
        grammars = self._batch.grammar[load.slots]
        if not grammars.any():
            return NO_CHAINS
        leaf = (probability >= WORTH) & (tree.depth > 0)
        leaf[tree.parent[tree.parent >= 0]] = False
        leaves = np.flatnonzero(leaf & grammars.astype(bool)[tree.request])
        return self._chains(leaves, [state_at(grammars, tree, node) for node in leaves.tolist()])

    def _chains(self, above: np.ndarray, states: Sequence[State | None]) -> Chains:
        """Return what ``states`` [m] force below the nodes ``above`` int64 [m]."""
        if len(above) == 0:
            return NO_CHAINS
        tokens = np.full((len(above), LONGEST), -1)
        for row, state in zip(tokens, states, strict=True):
            forced = _forced(state) if state else []
            row[: len(forced)] = forced
        return Chains(above, tokens, np.full(tokens.shape, np.log(FORCED)), np.full(len(above), GRAMMAR, np.int8))


def _forced(state: State) -> list[int]:
    try:
        return state.forced(LONGEST)
    except GrammarFailed:
        return []


def _allowed(state: State | None, tokens: np.ndarray) -> int:
    """Count the first of ``tokens`` [L] that are allowed; -1 ends them."""
    for position, token in enumerate(tokens.tolist()):
        try:
            state = state.after(token) if state and token >= 0 else None
        except GrammarFailed:
            state = None
        if state is None:
            return position
    return len(tokens)
