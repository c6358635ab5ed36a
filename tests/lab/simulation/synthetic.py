"""Recordings without a network: trees of a draft whose probabilities are true, over texts of random tokens."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.arrays import begins, ragged_arange
from echo_trt_lab.calibration.trees import COPIED, Trees

VOCAB = 1000


def recorded(
    lengths: list[int],
    levels: int = 4,
    beams: int = 2,
    width: int = 3,
    seed: int = 0,
    right: float | None = None,
    copied: float = 0.3,
) -> Trees:
    """Answers of ``lengths`` tokens with a tree at each place, and at a share ``copied`` of them a continuation.

    Each token is easy or hard to guess, from wherever it is drafted: its q is what it says. ``right``: P(the best child
    is the text's own) everywhere, the others never are.
    """
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    answer_begins, count = begins(lengths), lengths - 1
    request, index = np.repeat(np.arange(len(lengths)), count), ragged_arange(count) + 1
    answers = rng.integers(0, VOCAB, answer_begins[-1])
    ease = np.append(rng.beta(0.8, 0.6, len(answers)), np.zeros(COPIED + levels))
    text = np.append(answers, np.full(COPIED + levels, -1))
    where = answer_begins[request] + index
    columns = [_positions(rng, text, ease, where, levels, beams, width, right)]
    parent, token, depth, log_q = columns[0]
    nodes = parent.shape[1]
    run = np.where(rng.random(len(where)) < copied, rng.geometric(0.4, len(where)), 0)
    ahead = np.arange(COPIED)
    follows = text[where[:, None] + ahead]
    ends = ahead < (lengths[request] - index)[:, None]
    copies = np.where((ahead < run[:, None] - 1) & ends, follows, VOCAB + 1)
    return Trees(
        answers=answers.astype(np.int32),
        answer_begins=answer_begins,
        group=np.zeros(len(lengths), np.int64),
        groups=np.array(["all"]),
        request=request,
        index=index,
        node_begins=np.arange(len(where) + 1) * nodes,
        parent=parent.reshape(-1).astype(np.int16),
        token=token.reshape(-1).astype(np.int32),
        depth=depth.reshape(-1).astype(np.int8),
        log_q=log_q.reshape(-1).astype(np.float32),
        copied=np.where((run > 0)[:, None], copies, -1).astype(np.int32),
        matched=np.minimum(run, 4).astype(np.int16),
    )


def _positions(rng, text, ease, where, levels, beams, width, right):
    """parent, token, depth and log q of all nodes [P, nodes]; every position's tree has the same shape."""
    count = len(where)
    on_path, score = np.ones((count, 1), bool), np.zeros((count, 1))
    frontier = np.full((count, 1), -1)
    parts, total = [], 0
    for level in range(1, levels + 1):
        truth, easy = text[where + level - 1], ease[where + level - 1]
        shape = (*frontier.shape, width)
        best = np.where(on_path, easy[:, None], rng.beta(0.8, 0.6, frontier.shape)) * 0.97
        if right is not None:
            best = np.full(frontier.shape, right)
        share = best[..., None] * (1 - best[..., None]) ** np.arange(width)
        draw = rng.random(frontier.shape)[..., None]
        hit = (draw < share.cumsum(axis=-1)) & (draw >= share.cumsum(axis=-1) - share) & on_path[..., None]
        if right is not None:
            hit[..., 1:] = False
        tokens = VOCAB + 2 + np.broadcast_to(np.arange(width), shape)
        tokens = np.where(hit, truth[:, None, None], tokens)
        log_q = np.log(np.maximum(share, 1e-9))
        parent = np.broadcast_to(frontier[..., None], shape)
        parts.append([a.reshape(count, -1) for a in (parent, tokens, np.full(shape, level), log_q)])
        index = total + np.arange(frontier.shape[1] * width)
        total += len(index)
        scores = (score[..., None] + log_q).reshape(count, -1)
        chosen = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :beams], axis=1)
        frontier, score = index[chosen], np.take_along_axis(scores, chosen, axis=1)
        on_path = np.take_along_axis(hit.reshape(count, -1), chosen, axis=1)
    return [np.concatenate([p[i] for p in parts], axis=1) for i in range(4)]
