"""Sampling from rows of logits: penalties, bias, grammar masks, limits (top-k, top-p, min-p) and draws, in this
order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from echo_trt.speculation.sampling.draw import sample
from echo_trt.speculation.sampling.penalties import penalise


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters and token history of n rows of logits. Engines that keep logits on a device sample there
    (backends.cuda.choose).

    temperature, top_p, min_p         float64 [n]; top_k, seed, position int64 [n], as of ``draw.sample``
    repetition, presence, frequency   float64 [n], as of ``penalties.penalise``
    history_row, history_token        int64 [k]: tokens that penalties of a row look at; history_generated bool [k]
    logit_bias_row, logit_bias_token  int64 [j], and logit_bias float32 [j]: added to logits; -inf shuts a token out
    masks                             uint8 [n, ceil(V / 8)], of allowed tokens, the first in the lowest bit; None: all
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    history_row: np.ndarray
    history_token: np.ndarray
    history_generated: np.ndarray
    logit_bias_row: np.ndarray
    logit_bias_token: np.ndarray
    logit_bias: np.ndarray
    masks: np.ndarray | None = None


def part_of(choice: SamplingBatch, part: np.ndarray) -> SamplingBatch:
    """Return the choice at rows ``part`` int64 [m], of which none is there twice."""
    index_of = np.full(len(choice.seed), -1)
    index_of[part] = np.arange(len(part))
    values = {field.name: getattr(choice, field.name) for field in fields(choice)}
    for kind in ("history", "logit_bias"):
        row = index_of[values[f"{kind}_row"]]
        inside = row >= 0
        values |= {name: value[inside] for name, value in values.items() if name.startswith(kind)}
        values[f"{kind}_row"] = row[inside]
    values |= {n: v[part] for n, v in values.items() if v is not None and not n.startswith(("history", "logit_bias"))}
    return SamplingBatch(**values)


def choose(logits: np.ndarray, choice: SamplingBatch) -> np.ndarray:
    """Choose a token per row of ``logits`` float [n, V], which stay as they are: int64 [n]."""
    c = choice
    if len(c.history_row) or len(c.logit_bias_row):
        history = c.history_row, c.history_token, c.history_generated
        logits = penalise(logits, *history, c.repetition, c.presence, c.frequency)
        np.add.at(logits, (c.logit_bias_row, c.logit_bias_token), c.logit_bias)  # a stop token may be biased, too
    if c.masks is not None:
        bits = np.unpackbits(c.masks, axis=1, bitorder="little", count=logits.shape[1])
        logits = np.where(bits == 0, np.float32(-np.inf), np.asarray(logits, np.float32))
    return sample(logits, c.temperature, c.top_k, c.top_p, c.seed, c.position, c.min_p)
