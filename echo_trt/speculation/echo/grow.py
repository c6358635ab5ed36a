"""Draft and gate: grow every request's tree level by level, as deep as its confidence carries it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.echo import gates
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.super_tree import SuperTree


def grow(
    roots: np.ndarray,
    draft: Draft,
    settings: EchoSettings,
    max_draft_len: np.ndarray,
    gate_by_gate: bool = False,
    stops: Mapping[int, float] = MappingProxyType({}),
) -> tuple[SuperTree, np.ndarray]:
    """Draft level by level, or ``gate_by_gate`` where a draft looks ahead. A request below a gate stops there.

    Each request that goes on claims its best node of the level. Where the budget has fewer nodes left than there are
    claims, the most confident requests get them, and the others stop.

    ``stops``: gate -> share of single requests that end there, see ``EchoSettings.reach``.

    roots int64 [B]: pending tokens. max_draft_len int64 [B]: draft tokens in a row that a request can still use.
    Returns the tree of all candidates and claimed_node int64 [B] (see ``allocate``).
    """
    tree = SuperTree.from_roots(roots)
    claimed_node = np.arange(len(roots))
    spare = settings.spare(len(roots))
    requests = np.flatnonzero(max_draft_len > 0)
    if spare == 0 or len(requests) == 0:
        return tree, claimed_node
    frontier = requests[:, None]  # int64 [A, w], nodes of a request to expand, -1 where there are fewer than w
    beams, reached = settings.beams, settings.max_depth
    if gate_by_gate:
        beams = settings.beams_for(len(roots))
        reached = settings.reach(0, len(requests), spare, stops)
        draft.look_ahead(reached, beams, settings.width, settings.max_nodes(len(roots)))
    log_q, tokens = draft.expand_roots(requests)
    for depth in range(1, settings.max_depth + 1):
        children, scores = _add_children(tree, frontier, log_q, tokens, settings.width)
        row, best = np.arange(len(children)), scores.argmax(axis=1)
        confidence = np.exp(scores[row, best])
        claims = gates.passes(settings.gates, depth, confidence) & (confidence > 0)
        if settings.budget is not None:
            claims = _most_confident(claims, confidence, spare)
            spare -= int(claims.sum())
        claimed_node[requests[claims]] = children[row, best][claims]
        deeper = claims & (max_draft_len[requests] > depth)
        ended = depth == settings.max_depth or (depth == reached and depth not in settings.gates)
        if ended or spare == 0 or not deeper.any():  # what is left of the budget buys width
            break
        requests = requests[deeper]
        frontier = _best(children[deeper], scores[deeper], beams)
        if depth == reached:
            reached = settings.reach(depth, len(requests), spare, stops)
            draft.look_ahead(reached, beams, settings.width, settings.max_nodes(len(roots)))
        expanded = frontier >= 0
        log_q, tokens = draft.expand(tree, frontier[expanded])
        log_q, tokens = _scatter(expanded, log_q, tokens)
    return tree, claimed_node


def _add_children(
    tree: SuperTree, frontier: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add children of ``frontier`` int64 [A, w] from log_q and tokens [A * w, k]. Returns indices and scores.

    indices int64, scores float32 [A, w * width]: -1 and -inf where a child does not exist.
    """
    log_q, tokens = np.minimum(log_q[:, :width], 0), tokens[:, :width]  # low precision may round log 1 to above 0
    parents = np.repeat(frontier.reshape(-1), log_q.shape[1])
    scores = (np.where(frontier >= 0, tree.score[frontier], -np.inf).reshape(-1, 1) + log_q).reshape(-1)
    exists = scores > -np.inf
    index = np.full(len(scores), -1, np.int64)
    index[exists] = tree.add(parents[exists], tokens.reshape(-1)[exists], scores[exists])
    return index.reshape(len(frontier), -1), scores.reshape(len(frontier), -1)


def _best(children: np.ndarray, scores: np.ndarray, beams: int) -> np.ndarray:
    """Return the ``beams`` best of a row: int64 [A, min(beams, width)], -1 where there are fewer."""
    if scores.shape[1] > beams:
        best = np.argpartition(-scores, beams - 1, axis=1)[:, :beams]
        return np.take_along_axis(children, best, axis=1)
    return children


def _scatter(expanded: np.ndarray, log_q: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread rows [F, k] over the rows [A * w, k] of ``expanded`` bool [A, w]."""
    if expanded.all():
        return log_q, tokens
    indices = expanded.reshape(-1)
    full_q = np.full((len(indices), log_q.shape[1]), -np.inf, np.float32)
    full_tokens = np.zeros(full_q.shape, np.int64)
    full_q[indices], full_tokens[indices] = log_q, tokens
    return full_q, full_tokens


def _most_confident(claims: np.ndarray, confidence: np.ndarray, spare: int) -> np.ndarray:
    """Keep the ``spare`` most confident requests of ``claims`` bool [A]; confidence float [A]."""
    if claims.sum() <= spare:
        return claims
    kept = np.zeros_like(claims)
    kept[np.argsort(-np.where(claims, confidence, -1.0), kind="stable")[:spare]] = True
    return kept
