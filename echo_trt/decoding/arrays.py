"""Ragged batches as flat arrays: the few index tricks that keep Python loops out of a step."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.compiled import compiled


def begins(counts: np.ndarray) -> np.ndarray:
    """counts [B] -> where each section begins, and the total: int64 [B+1]."""
    return _begins(np.ascontiguousarray(counts, np.int64))


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """counts [B] -> 0..counts[0]-1, 0..counts[1]-1, ... as one array [sum counts]."""
    return _ragged_arange(np.ascontiguousarray(counts, np.int64))


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Each element's place among those of its group: 0 for a group's first, 1 for its second, ... [n]"""
    return _rank_within(np.ascontiguousarray(groups, np.int64), int(groups.max(initial=-1)) + 1)


@compiled("i8[::1](i8[::1])")
def _begins(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, np.int64)
    for i in range(len(counts)):
        out[i + 1] = out[i] + counts[i]
    return out


@compiled("i8[::1](i8[::1])")
def _ragged_arange(counts: np.ndarray) -> np.ndarray:
    out, end = np.empty(counts.sum(), np.int64), 0
    for count in counts:
        for place in range(count):
            out[end + place] = place
        end += count
    return out


@compiled("i8[::1](i8[::1], i8)")
def _rank_within(groups: np.ndarray, count: int) -> np.ndarray:
    ranks, seen = np.empty(len(groups), np.int64), np.zeros(count, np.int64)
    for i in range(len(groups)):
        ranks[i] = seen[groups[i]]
        seen[groups[i]] += 1
    return ranks
