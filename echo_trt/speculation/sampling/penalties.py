"""Penalties on tokens that occurred before: in the request's text and on the path down to a node.

presence and frequency are OpenAI's, over generated tokens: logit - presence * [said] - frequency * times said.
repetition is CTRL's (Keskar et al. 2019, section 4.1) as Hugging Face and TensorRT-LLM have it, over prompt and
generated tokens, and comes first: a positive logit is divided by it, a negative one multiplied.
"""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.super_tree import SuperTree

_MIN_REPETITION = 1e-6  # a repetition penalty that divides without overflow


def tokens_above(tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens on the paths to ``nodes`` int64 [m], roots' apart: row and token, int64 [k].

    ``row`` is an index into ``nodes``. A root has no tokens: it is the text's last one.
    """
    rows, tokens = [], []
    row, node = np.arange(len(nodes)), nodes
    while len(node):
        below = tree.parent[node] >= 0
        row, node = row[below], node[below]
        rows.append(row)
        tokens.append(tree.token[node])
        node = tree.parent[node]
    return np.concatenate(rows or [row]), np.concatenate(tokens or [node])


def penalise(
    logits: np.ndarray,
    row: np.ndarray,
    token: np.ndarray,
    generated: np.ndarray,
    repetition: np.ndarray,
    presence: np.ndarray,
    frequency: np.ndarray,
) -> np.ndarray:
    """Apply penalties, float [m], to rows of ``logits`` float [m, V]: a new array float32 [m, V].

    row, token int64 [k], in any order: a token said before that row. generated bool [k]: else it is the prompt's. The
    work grows with k and not with V, but for the copy.
    """
    out = np.array(logits, np.float32)
    repeats = repetition[row] != 1
    history = row[repeats], token[repeats]
    value, factor = out[history], np.maximum(repetition, _MIN_REPETITION)[history[0]]
    out[history] = np.where(value > 0, value / factor, value * factor)  # a token said twice is written the same twice
    keys, times = np.unique(row[generated] * out.shape[1] + token[generated], return_counts=True)
    history = np.divmod(keys, out.shape[1])
    out[history] -= presence[history[0]] + frequency[history[0]] * times
    return out
