"""Recordings made by hand: answers, and what was copied and drafted at their positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.speculation.arrays import begins
from echo_trt_lab.calibration.trees import COPIED, Trees

#: Of a position: (parent among the position's nodes or -1, token, depth, log q), level by level.
Nodes = Sequence[tuple[int, int, int, float]]


def recording(
    answers: Sequence[Sequence[int]],
    positions: Sequence[tuple[int, int]],
    nodes: Sequence[Nodes] | None = None,
    copied: Sequence[Sequence[int]] | None = None,
    matched: Sequence[int] | None = None,
) -> Trees:
    """positions: (request, index); the others are of each position."""
    count = len(positions)
    nodes = nodes or [()] * count
    columns = list(zip(*(node for each in nodes for node in each), strict=True)) or [(), (), (), ()]
    text = np.full((count, COPIED), -1, np.int32)
    for row, chain in zip(text, copied or [()] * count, strict=True):
        row[: len(chain)] = chain
    return Trees(
        answers=np.concatenate(answers).astype(np.int32),
        answer_begins=begins(np.array([len(a) for a in answers])),
        group=np.zeros(len(answers), np.int64),
        groups=np.array(["all"]),
        request=np.array([request for request, _ in positions]),
        index=np.array([index for _, index in positions]),
        node_begins=begins(np.array([len(each) for each in nodes])),
        parent=np.array(columns[0], np.int16),
        token=np.array(columns[1], np.int32),
        depth=np.array(columns[2], np.int8),
        log_q=np.array(columns[3], np.float32),
        copied=text,
        matched=np.array(matched if matched is not None else [0] * count, np.int16),
    )


def paths_at(trees: Trees, position: int) -> dict[tuple[int, ...], list[tuple[float, int]]]:
    """Path -> its recorded children, (log q, token) in order: a plain reading of the columns."""
    begin, end = trees.node_begins[position], trees.node_begins[position + 1]
    paths: list[tuple[int, ...]] = []
    children: dict[tuple[int, ...], list[tuple[float, int]]] = {(): []}
    for node in range(begin, end):
        above = paths[trees.parent[node]] if trees.parent[node] >= 0 else ()
        path = (*above, int(trees.token[node]))
        paths.append(path)
        children.setdefault(above, []).append((float(trees.log_q[node]), path[-1]))
        children.setdefault(path, [])
        assert trees.depth[node] == len(path)
    return children


def answer_of(trees: Trees, request: int) -> list[int]:
    return trees.answers[trees.answer_begins[request] : trees.answer_begins[request + 1]].tolist()
