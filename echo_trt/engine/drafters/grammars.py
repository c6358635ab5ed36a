"""Drafts under grammars: what is forbidden is not proposed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.speculation.drafts import Draft, Proposals
from echo_trt.speculation.super_tree import SuperTree


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
