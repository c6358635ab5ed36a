"""Log-probabilities of tokens: the log-softmax of the target's own logits, before penalties, bias and temperature."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.ragged import rank_within


def log_normalisers(logits: np.ndarray) -> np.ndarray:
    """log sum exp of each row of ``logits`` [m, V] float32: what to take off a logit. float64 [m]"""
    peak = logits.max(axis=1, keepdims=True)
    return peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64))


def best_tokens(logits: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` [m] best tokens of each row of ``logits`` [m, V]: row, token, [sum count] each, best first.

    Of tokens that tie, the lowest ids come first, so neither the batch nor the tree has a say in which are returned.
    """
    most = min(int(count.max(initial=0)), logits.shape[1])
    if most == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    least = np.partition(logits, -most, axis=1)[:, -most]
    row, token = np.nonzero(logits >= least[:, None])
    order = np.lexsort((token, -logits[row, token], row))
    row, token = row[order], token[order]
    kept = rank_within(row) < count[row]
    return row[kept], token[kept]
