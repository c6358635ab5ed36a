"""Replays the growth of recorded trees: every candidate with its score, and whether it was accepted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.engine.drafters.lookup import copied_chains
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED_START, Acceptance
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.super_tree import SuperTree
from echo_trt_lab.calibration.trees import RecordedDraft, Trees

BATCH = 512  # positions that are replayed together; larger: fewer calls, more memory


@dataclass(frozen=True)
class Observed:
    """Candidates of all trees and whether they were accepted; within a depth the head's stand tree by tree.

    source    int [n], index in ``CALIBRATED``
    depth     int [n], 1 below the root
    score     float [n], log of the path probability
    parent    int [n], index of the parent, -1 for a root
    accepted  bool [n]
    tree      int [n], the recorded position
    """

    source: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    parent: np.ndarray
    accepted: np.ndarray
    tree: np.ndarray


def observe(trees: Trees, lookup: list[float] | None, max_depth: int, beams: int, width: int) -> Observed:
    """Replay the growth of full trees, with copied continuations if ``lookup`` has their acceptance rates."""
    neutral = Acceptance.uncalibrated(max_depth, CALIBRATED_START)
    parts, total = [], 0
    for begin in range(0, len(trees), BATCH):
        positions = np.arange(begin, min(begin + BATCH, len(trees)))
        tree = grow_recorded(trees, positions, neutral, lookup, max_depth, beams, width)
        truth = trees.truth(positions[tree.request], np.maximum(tree.depth, 1))
        accepted = tree.parent < 0
        for depth in range(1, max_depth + 1):
            level = np.flatnonzero(tree.depth == depth)
            accepted[level] = accepted[tree.parent[level]] & (tree.token[level] == truth[level])
        # After an answer's end it is not known what would have been accepted.
        kept = np.flatnonzero((tree.parent >= 0) & (tree.depth <= trees.left[positions[tree.request]]))
        index = np.full(len(tree) + 1, -1)
        index[kept] = total + np.arange(len(kept))
        parent, position = index[tree.parent[kept]], positions[tree.request[kept]]
        parts.append((tree.source[kept], tree.depth[kept], tree.score[kept], parent, accepted[kept], position))
        total += len(kept)
    source, depth, score, parent, accepted, position = map(np.concatenate, zip(*parts, strict=True))
    return Observed(source, depth, score, parent, accepted, position)


def grow_recorded(
    trees: Trees,
    positions: np.ndarray,
    acceptance: Acceptance,
    lookup: list[float] | None,
    max_depth: int,
    beams: int,
    width: int,
) -> SuperTree:
    count = len(positions)
    max_draft_len = np.full(count, max_depth)
    copied = [] if lookup is None else [recorded_chains(trees, positions, lookup, max_depth)]
    candidates = Candidates(SuperTree.from_roots(np.zeros(count)), acceptance, np.ones(count), max_draft_len, copied)
    draft = RecordedDraft(trees, positions, width)
    roots = np.arange(count)
    log_q, tokens = draft.expand_roots(roots)
    candidates.add(roots, log_q, tokens, width)
    for depth in range(1, max_depth):
        nodes = np.sort(candidates.frontier(depth, beams))
        log_q, tokens = draft.expand(candidates.tree, nodes)
        candidates.add(nodes, log_q, tokens, width)
    return candidates.tree


def recorded_chains(trees: Trees, positions: np.ndarray, lookup: list[float], length: int) -> Chains:
    """Return the copied text that was recorded at ``positions``, as chains below their roots."""
    tokens, matched = trees.copied[positions, :length].astype(np.int64), trees.matched[positions].astype(np.int64)
    return copied_chains(tokens, matched, np.log(np.asarray(lookup)))
