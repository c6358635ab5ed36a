"""N-gram tables from contexts that are written out."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt_lab.ngram_tables import context_keys

#: context -> what follows, and how probably
Known = dict[tuple[int, ...], tuple[int, float]]


def table(known: Known, longest: int) -> NGrams:
    keys = np.array([context_keys(np.array(context), longest)[-1, len(context) - 1] for context in known], np.uint32)
    order = np.argsort(keys)
    follows = np.array([token for token, _ in known.values()], np.int64)
    chances = np.array([chance for _, chance in known.values()], np.float64)
    return NGrams(keys[order], follows[order], chances[order], longest)
