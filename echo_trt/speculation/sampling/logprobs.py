"""Log-probabilities of tokens: the log-softmax of the target's own logits, before penalties, bias and temperature."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.arrays import ragged_arange

_GROUP = 32  # tokens in a group, whose maximum is sorted first; larger: fewer maxima, more tokens above them


def log_normalisers(logits: np.ndarray) -> np.ndarray:
    """Return log sum exp of a row of ``logits`` float32 [m, V], to be taken off its logits: float32 [m]."""
    peak = logits.max(axis=1, keepdims=True)
    parts = logits - peak
    normalisers: np.ndarray = peak[:, 0] + np.log(np.exp(parts, out=parts).sum(axis=1))
    return normalisers


def best_tokens(logits: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``count`` int64 [m] best tokens of a row of ``logits`` float32 [m, V], best first.

    Returns row and token, int64 [sum count]. Ties are broken by the lowest id, so the result depends neither on the
    batch nor on the tree.
    """
    maximum = min(int(count.max(initial=0)), logits.shape[1])
    if maximum == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    row, token = np.nonzero(logits >= reached(logits, maximum)[:, None])
    order = np.lexsort((token, -logits[row, token], row))
    row, token = row[order], token[order]
    kept = ragged_arange(np.bincount(row)) < count[row]
    return row[kept], token[kept]


def reached(values: np.ndarray, count: int) -> np.ndarray:
    """Return a value that at least ``count`` of a row of ``values`` float [m, V] reach: float [m].

    The values are cut into groups of ``width``; at least ``count`` values reach the count-th largest of the groups'
    maxima.
    """
    width = max(values.shape[1] // _GROUP, count)
    maxima = values[:, : values.shape[1] // width * width].reshape(len(values), -1, width).max(axis=1)
    minimum: np.ndarray = np.partition(maxima, -count, axis=1)[:, -count]
    return minimum
