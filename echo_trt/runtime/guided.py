"""Drafts under grammars: what is forbidden is not proposed, and what is forced costs no draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.decoding.goodput.model.ngrams import NO_CHAINS, Chains
from echo_trt.decoding.planner import Continuations, Copier
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.runtime.slots import Slots

FORCED = 0.97  # P(a forced token is accepted) before anything is learnt; larger: longer chains at first
LONGEST = 16  # tokens of a chain; larger: more time to look for them, rarely a longer one
WORTH = 0.1  # P(accept) of a leaf that is continued; larger: fewer are looked at


def state_at(grammars: Sequence[State | None] | np.ndarray, tree: SuperTree, node: int) -> State | None:
    """Where the path to ``node`` leads under its request's grammar, of ``grammars`` [B] at the roots.

    None: the request has no grammar, or the path is forbidden, which happens to no node that ``prune`` let through.
    """
    path: list[int] = []
    state: State | None = grammars[tree.request[node]]
    while state is not None and tree.parent[node] >= 0:
        path.append(int(tree.token[node]))
        node = tree.parent[node]
    for token in reversed(path):
        try:
            state = state.after(token) if state else None
        except GrammarFailed:  # verification will meet it, if it gets there
            return None
    return state


def prune(
    states: Sequence[State | None] | np.ndarray, log_q: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give forbidden proposals probability 0 and their share to those that are allowed, still best first.

    states  [F], of the nodes that were expanded; None: everything is allowed
    log_q   float [F, k], overwritten
    tokens  int [F, k], overwritten
    """
    for row, state in enumerate(states):
        if state is None:
            continue
        try:
            allowed = state.allowed(tokens[row])
        except GrammarFailed:
            continue
        if allowed.all():
            continue
        left = max(1 - float(np.exp(log_q[row][~allowed]).sum()), np.exp(log_q[row][allowed]).sum(initial=1e-6))
        log_q[row] = np.where(allowed, log_q[row] - np.log(left), -np.inf)
        order = np.argsort(-log_q[row], kind="stable")
        log_q[row], tokens[row] = log_q[row][order], tokens[row][order]
    return log_q, tokens


class Grammars:
    """Proposes, at no cost, what running requests' grammars force, and otherwise what ``copier`` copies."""

    def __init__(self, state: Slots, copier: Copier | None):
        self._state, self._copier = state, copier

    def continuations(self, slots: np.ndarray, length: int) -> Continuations | None:
        """Do as ``Copier``: a forced chain comes before copied text, and copied text ends where it is forbidden."""
        copied = self._copier.continuations(slots, length) if self._copier else None
        grammars = self._state.grammar[slots]
        if not grammars.any():
            return copied
        count = len(slots)
        tokens, log_q = np.full((count, LONGEST), -1), np.full(count, -np.inf)
        is_forced, matched = np.zeros(count, bool), np.zeros(count, np.int64)
        if copied is not None:
            tokens[:, :length] = copied.tokens[:, :LONGEST]
            log_q, matched = copied.log_q.copy(), copied.matched
        for i in np.flatnonzero(grammars):
            forced = _forced(grammars[i])
            if forced:
                tokens[i] = -1
                tokens[i, : len(forced)] = forced
                log_q[i], is_forced[i] = np.log(FORCED), True
            else:
                tokens[i, _allowed(grammars[i], tokens[i]) :] = -1
        return Continuations(tokens, log_q, matched, is_forced)

    def constrained(self, slots: np.ndarray) -> np.ndarray:
        constrained: np.ndarray = self._state.grammar[slots].astype(bool)
        return constrained

    def chains(self, tree: SuperTree, probability: np.ndarray, slots: np.ndarray, room: np.ndarray) -> Chains:
        """What is forced behind the leaves of ``tree``, whose nodes have P(accept) ``probability`` float64 [n].

        slots, room  int64 [B], of the requests; room: the depth that its nodes may have
        """
        grammars, columns = self._state.grammar[slots], []
        leaf = (probability >= WORTH) & (tree.depth > 0)
        leaf[tree.parent[tree.parent >= 0]] = False
        size = len(tree)
        for node in np.flatnonzero(leaf & grammars.astype(bool)[tree.request]).tolist():
            request, depth = int(tree.request[node]), int(tree.depth[node])
            state, above, p = state_at(grammars, tree, node), node, float(probability[node])
            for token in _forced(state)[: max(int(room[request]) - depth, 0)] if state else ():
                p, depth = p * FORCED, depth + 1
                columns.append((node, above, token, request, depth, p))
                above, size = size, size + 1
        if not columns:
            return NO_CHAINS
        return Chains(*(np.array(column) for column in zip(*columns, strict=True)))


def _forced(state: State) -> list[int]:
    try:
        return state.forced(LONGEST)
    except GrammarFailed:
        return []


def _allowed(state: State | None, tokens: np.ndarray) -> int:
    """Count the first of ``tokens`` [L] that are allowed; -1 ends them."""
    for place, token in enumerate(tokens.tolist()):
        try:
            state = state.after(token) if state and token >= 0 else None
        except GrammarFailed:
            state = None
        if state is None:
            return place
    return len(tokens)
