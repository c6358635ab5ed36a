"""Log-probabilities of tokens: the log-softmax of the target's own logits, before penalties, bias and temperature."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.arrays import rank_within

_GROUP = 32  # tokens whose best one is looked at first


def log_normalisers(logits: np.ndarray) -> np.ndarray:
    """log sum exp of each row of ``logits`` [m, V] float32: what to take off a logit. float32 [m]"""
    peak = logits.max(axis=1, keepdims=True)
    parts = logits - peak
    normalisers: np.ndarray = peak[:, 0] + np.log(np.exp(parts, out=parts).sum(axis=1))
    return normalisers


def best_tokens(logits: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` [m] best tokens of each row of ``logits`` [m, V]: row, token, [sum count] each, best first.

    Of tokens that tie, the lowest ids come first, so neither the batch nor the tree has a say in which are returned.
    """
    most = min(int(count.max(initial=0)), logits.shape[1])
    if most == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # The best of each of W groups are few to sort through; the last that is wanted is no worse than the last of those.
    width = max(logits.shape[1] // _GROUP, most)
    groups = logits.shape[1] // width * width
    maxima = logits[:, :groups].reshape(len(logits), -1, width).max(axis=1)
    least = np.partition(maxima, -most, axis=1)[:, -most]
    row, token = np.nonzero(logits >= least[:, None])
    order = np.lexsort((token, -logits[row, token], row))
    row, token = row[order], token[order]
    kept = rank_within(row) < count[row]
    return row[kept], token[kept]
