"""Drafts under grammars: what is forbidden is not proposed, and what is forced costs no draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.speculation.chains import Chains, PromptLookup
from echo_trt.speculation.drafts import Draft, Proposals
from echo_trt.speculation.sources import GRAMMAR, LOOKUP
from echo_trt.speculation.super_tree import SuperTree

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


class GuidedDraft(Draft):
    """A draft whose proposals fit the requests' grammars; it never looks ahead, since a device knows no grammar."""

    def __init__(self, draft: Draft, grammars: np.ndarray):
        """``grammars`` [B]: what may follow each request's text, None where anything may."""
        self._draft, self._grammars = draft, grammars

    def expand_roots(self, requests: np.ndarray) -> Proposals:
        return prune(self._grammars[requests], *self._draft.expand_roots(requests))

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        states = [state_at(self._grammars, tree, node) for node in nodes.tolist()]
        return prune(states, *self._draft.expand(tree, nodes))


class GrammarProposer:
    """Proposes, at no cost, what running requests' grammars force, and otherwise what ``copier`` copies."""

    def __init__(self, batch: InputBatch, copier: PromptLookup | None):
        self._batch, self._copier = batch, copier

    def constrained(self, slots: np.ndarray) -> np.ndarray:
        constrained: np.ndarray = self._batch.grammar[slots].astype(bool)
        return constrained

    def chains(self, slots: np.ndarray, length: int) -> Chains:
        """Do as ``PromptLookup``: a forced chain comes before copied text, and copied text ends where it is
        forbidden.
        """
        count = len(slots)
        tokens, log_p = np.full((count, LONGEST), -1), np.zeros((count, LONGEST))
        source = np.full(count, LOOKUP, np.int8)
        if self._copier:
            copied, length = self._copier.chains(slots, length), min(length, LONGEST)
            tokens[:, :length], log_p[:] = copied.tokens[:, :length], copied.log_p[:, :1]
        grammars = self._batch.grammar[slots]
        for i in np.flatnonzero(grammars):
            forced = _forced(grammars[i])
            if forced:
                tokens[i] = -1
                tokens[i, : len(forced)] = forced
                log_p[i], source[i] = np.log(FORCED), GRAMMAR
            else:
                tokens[i, _allowed(grammars[i], tokens[i]) :] = -1
        return Chains(np.arange(count), tokens, log_p, source)

    def leaf_chains(self, tree: SuperTree, probability: np.ndarray, slots: np.ndarray) -> Chains:
        """Return what is forced behind likely leaves of ``tree``, whose nodes have ``probability`` float64 [n].

        slots int64 [B], of the requests.
        """
        grammars = self._batch.grammar[slots]
        leaf = (probability >= WORTH) & (tree.depth > 0)
        leaf[tree.parent[tree.parent >= 0]] = False
        leaves = np.flatnonzero(leaf & grammars.astype(bool)[tree.request])
        tokens = np.full((len(leaves), LONGEST), -1)
        for row, node in zip(tokens, leaves.tolist(), strict=True):
            state = state_at(grammars, tree, node)
            forced = _forced(state) if state else []
            row[: len(forced)] = forced
        source = np.full(len(leaves), GRAMMAR, np.int8)
        return Chains(leaves, tokens, np.full(tokens.shape, np.log(FORCED)), source)


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
