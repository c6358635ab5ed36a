"""From recorded trees to a calibration: AUC and thresholds by depth, P(accept | score, depth), what children bring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import rankdata

from echo_trt.calibration.store import Calibration, Gate
from echo_trt.calibration.trees import RecordedDraft, Trees
from echo_trt.decoding.goodput.acceptance import CALIBRATED, Acceptance, knots
from echo_trt.decoding.goodput.candidates import Candidates
from echo_trt.decoding.planner import Continuations
from echo_trt.decoding.super_tree import SuperTree

SPOTS = 3  # sparse gates: the root's and so many less one deeper
QUANTILES = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
CHILDREN = 2  # of a node, whose worth is foreseen
PRIOR = 10  # made-up observations behind each lookup probability, so that a few copies do not decide it
BATCH = 512  # positions that are replayed together


@dataclass(frozen=True)
class Observed:
    """Candidates and their fate: source, depth, score [n]; parent [n] among them, -1 a root; accepted bool [n]; tree
    [n], the recorded position. Within a depth, what the head proposed stands tree by tree."""

    source: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    parent: np.ndarray
    accepted: np.ndarray
    tree: np.ndarray


def fit(trees: Trees, target_sha256: str, draft_sha256: str, max_depth: int, beams: int, width: int) -> Calibration:
    """A calibration from all of ``trees``; at least a few hundred positions are needed for it to mean anything."""
    lookup = lookup_acceptance(trees)
    observed = observe(trees, lookup, max_depth, beams, width)
    head = observe(trees, None, max_depth, beams, width)
    table = acceptance_table(observed, max_depth)
    gates, fixed = fit_gates(head, max_depth)
    return Calibration(
        target_sha256=target_sha256,
        draft_sha256=draft_sha256,
        positions=len(trees),
        gates=gates,
        fixed_threshold=fixed,
        acceptance={name: np.round(rows, 5).tolist() for name, rows in zip(CALIBRATED, table, strict=True)},
        children=np.round(children_quantiles(observed, table, max_depth, beams), 4).tolist(),
        lookup=lookup,
    )


def lookup_acceptance(trees: Trees, longest: int = 4) -> list[float]:
    """P(the first copied token is the next) after a match of 1, 2, ... ``longest`` or more tokens."""
    has = trees.copied[:, 0] >= 0
    right = trees.copied[:, 0] == trees.truth(np.arange(len(trees)), np.ones(len(trees), np.int64))
    known = has & (trees.left >= 1)
    matched = np.minimum(trees.matched, longest)
    counts = [(known & (matched == m), 0.2 * m) for m in range(1, longest + 1)]
    shares = [(right[at].sum() + PRIOR * prior) / (at.sum() + PRIOR) for at, prior in counts]
    return np.clip(np.maximum.accumulate(shares), 0.01, 0.99).round(4).tolist()


def observe(trees: Trees, lookup: list[float] | None, max_depth: int, beams: int, width: int) -> Observed:
    """Replay the growth of full trees, with copied continuations if ``lookup`` says what those are worth."""
    neutral = Acceptance.uncalibrated(max_depth)
    parts, total = [], 0
    for begin in range(0, len(trees), BATCH):
        positions = np.arange(begin, min(begin + BATCH, len(trees)))
        tree = grow_recorded(trees, positions, neutral, lookup, max_depth, beams, width)
        truth = trees.truth(positions[tree.request], np.maximum(tree.depth, 1))
        accepted = tree.parent < 0
        for depth in range(1, max_depth + 1):
            level = np.flatnonzero(tree.depth == depth)
            accepted[level] = accepted[tree.parent[level]] & (tree.token[level] == truth[level])
        # Beyond the answer's end nobody knows.
        known = (tree.parent >= 0) & (tree.depth <= trees.left[positions[tree.request]])
        kept = np.flatnonzero(known)
        place = np.full(len(tree) + 1, -1)
        place[kept] = total + np.arange(len(kept))
        parts.append(
            (
                tree.source[kept],
                tree.depth[kept],
                tree.score[kept],
                place[tree.parent[kept]],
                accepted[kept],
                positions[tree.request[kept]],
            )
        )
        total += len(kept)
    return Observed(*map(np.concatenate, zip(*parts, strict=True)))


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
    room = np.full(count, max_depth)
    copied = None if lookup is None else continuations(trees, positions, lookup, max_depth)
    candidates = Candidates(SuperTree.from_roots(np.zeros(count)), acceptance, np.ones(count), room, copied)
    draft = RecordedDraft(trees, positions, width)
    candidates.add(np.arange(count)[:, None], *draft.expand_roots(np.arange(count)), width)
    for depth in range(1, max_depth):
        nodes = np.sort(candidates.frontier(depth, beams))
        candidates.add(nodes[:, None], *draft.expand(candidates.tree, nodes), width)
    return candidates.tree


def continuations(trees: Trees, positions: np.ndarray, lookup: list[float], length: int) -> Continuations:
    matched = trees.matched[positions].astype(np.int64)
    log_q = np.log(np.asarray(lookup))[np.clip(matched, 1, len(lookup)) - 1]
    return Continuations(trees.copied[positions, :length].astype(np.int64), log_q, matched)


def acceptance_table(observed: Observed, max_depth: int) -> np.ndarray:
    """Isotonic P(accepted | score) for each source and depth, at the knots: [sources, max_depth, KNOTS].

    A cell with little data borrows the head's table, which itself begins as the draft's own probability.
    """
    at = knots()
    table = np.empty((len(CALIBRATED), max_depth, len(at)))
    for source in range(len(CALIBRATED)):
        for depth in range(max_depth):
            here = (observed.source == source) & (observed.depth == depth + 1)
            fallback = at if source == 0 else table[0, depth]
            table[source, depth] = _isotonic(np.exp(observed.score[here]), observed.accepted[here], at, fallback)
    return np.clip(table, 1e-4, 0.999)


def _isotonic(x: np.ndarray, accepted: np.ndarray, at: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    # Observations between two knots count as one; PRIOR made-up ones spread over all knots hold empty places.
    cell = np.abs(np.sqrt(x) * (len(at) - 1)).round().astype(np.int64)
    count = np.bincount(cell, minlength=len(at)) + PRIOR / len(at)
    share = (np.bincount(cell, accepted, minlength=len(at)) + PRIOR / len(at) * fallback) / count
    return isotonic_regression(share, weights=count).x


def children_quantiles(observed: Observed, table: np.ndarray, max_depth: int, beams: int) -> np.ndarray:
    """What the best and the second child of a node that would be expanded is worth, as a share of the node.

    Quantiles [max_depth, CHILDREN, 5], nodes counted by their own worth: the likely ones are those that are expanded.
    """
    acceptance = Acceptance(table, np.zeros((max_depth, CHILDREN, len(QUANTILES))))
    worth = acceptance.probability(observed.source, observed.depth, observed.score)
    quantiles = np.zeros((max_depth, CHILDREN, len(QUANTILES)))
    for depth in range(max_depth):
        child = np.flatnonzero((observed.depth == depth + 1) & (observed.source != 1))
        parent = observed.parent[child]
        owner, base = (observed.tree[child], np.ones(len(child))) if depth == 0 else (parent, worth[parent])
        share = np.minimum(worth[child] / np.maximum(base, 1e-9), 0.999)
        order = np.lexsort((-share, owner))
        starts = np.concatenate(([True], np.diff(owner[order]) != 0))
        rank = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        for place in range(CHILDREN):
            chosen = order[rank == place]
            if len(chosen):
                quantiles[depth, place] = _weighted_quantiles(share[chosen], base[chosen])
    return quantiles


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    share = (np.cumsum(weights[order]) - 0.5 * weights[order]) / weights.sum()
    return np.interp(QUANTILES, share, values[order])


def fit_gates(head: Observed, max_depth: int) -> tuple[list[Gate], float]:
    """A gate for each depth, the sparse ones marked, and the best single threshold for those.

    conf is the best path probability of a depth, the label whether some path of that depth was accepted. A depth is
    worth a gate where conf tells the two apart (AUC) and where there is something to tell: the spread of the label.
    """
    confidence, label = [], []
    for depth in range(1, max_depth + 1):
        conf, reached = _by_tree(head, depth)
        confidence.append(conf)
        label.append(reached)
    aucs = [auc(c, y) for c, y in zip(confidence, label, strict=True)]
    spread = [2 * np.sqrt(y.mean() * (1 - y.mean())) if len(y) else 0.0 for y in label]
    merit = [(a - 0.5) * s for a, s in zip(aucs, spread, strict=True)]
    spots = [0]
    for depth in np.argsort(merit)[::-1].tolist():
        if len(spots) < SPOTS and all(abs(depth - s) >= 2 for s in spots):
            spots.append(depth)
    thresholds = [youden(c, y) for c, y in zip(confidence, label, strict=True)]
    pooled = [np.concatenate([part[s] for s in spots]) for part in (confidence, label)]
    gates = [
        Gate(
            depth=d + 1,
            auc=round(aucs[d], 4),
            samples=len(label[d]),
            accepted=round(float(label[d].mean()), 4) if len(label[d]) else 0.0,
            threshold=round(thresholds[d], 3),
            sweet_spot=d in spots,
        )
        for d in range(max_depth)
    ]
    return gates, round(youden(*pooled), 3)


def _by_tree(head: Observed, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every tree that has nodes of ``depth``: exp of their best score, and whether one of them was accepted."""
    at = np.flatnonzero(head.depth == depth)
    if len(at) == 0:
        return np.zeros(0), np.zeros(0, bool)
    starts = np.flatnonzero(np.concatenate(([True], np.diff(head.tree[at]) != 0)))
    return np.exp(np.maximum.reduceat(head.score[at], starts)), np.logical_or.reduceat(head.accepted[at], starts)


def auc(confidence: np.ndarray, label: np.ndarray) -> float:
    """P(an accepted one is more confident than one that is not), ties half; 0.5 where there are not both."""
    positive = int(label.sum())
    negative = len(label) - positive
    if positive == 0 or negative == 0:
        return 0.5
    ranks = rankdata(confidence)[label].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def youden(confidence: np.ndarray, label: np.ndarray) -> float:
    """The threshold with the largest share of accepted kept plus share of others cut: 0 where all are accepted, 1
    where none is."""
    positive = int(label.sum())
    if positive == len(label):
        return 0.0
    if positive == 0:
        return 1.0
    order = np.argsort(-confidence, kind="stable")
    kept, missed = np.cumsum(label[order]) / positive, np.cumsum(~label[order]) / (len(label) - positive)
    ranked = confidence[order]
    apart = np.append(ranked[1:] < ranked[:-1], True)  # equal ones pass a gate together
    # A gate passes what is above its threshold: half-way to the next.
    last = int(np.where(apart, kept - missed, -np.inf).argmax())
    return float(ranked[last] + ranked[min(last + 1, len(ranked) - 1)]) / 2
