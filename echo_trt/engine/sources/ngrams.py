"""The source of n-grams: where a draft ends, the table of the target's earlier answers goes on."""

from __future__ import annotations

import numpy as np

from echo_trt.engine.assemble import Networks
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, StepContext
from echo_trt.speculation.sources import NGRAM
from echo_trt.speculation.super_tree import SuperTree


class NGramSource(ChainSource):
    """Goes on below leaves; what was accepted lately shifts the table's probabilities (``Acceptance.bias``)."""

    def __init__(self, table: NGrams, settings: GoodputSettings, acceptance: Acceptance):
        self._table, self._settings, self._acceptance = table, settings, acceptance

    def extend(self, tree: SuperTree, probability: np.ndarray, load: StepContext) -> Chains:
        deepest = np.minimum(load.max_draft_len, self._settings.max_depth)
        shift, minimum = float(self._acceptance.bias[NGRAM, 0]), self._settings.tuning.min_continuation
        return self._table.chains(tree, probability, load.recent, deepest, shift, minimum)


def continuations(networks: Networks, settings: GoodputSettings, acceptance: Acceptance) -> ChainSource | None:
    """Make the source of a bundle; None: it has no table."""
    return NGramSource(networks.ngrams, settings, acceptance) if networks.ngrams else None
