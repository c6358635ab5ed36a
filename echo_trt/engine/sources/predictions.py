"""The source of predicted outputs: the text that a client expects, from where the answer stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from echo_trt.engine.assemble import Networks
from echo_trt.engine.batch import InputBatch
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import NO_CHAINS, Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, StepContext
from echo_trt.speculation.sources import PREDICTION

MATCHED = 4  # tokens that agree behind the next one, beyond which more are no surer; a sure position is not left
POSITION, AGREES, SURE, SINCE, RIGHT, WRONG = 0, 1, 2, 3, 4, 5 + MATCHED
STATE = 6 + 2 * MATCHED


class FollowingSource(ChainSource):
    """Proposes a chain below the root of each request of which something is known, by a state that follows its text.

    follow  moves the state over tokens of a text, as ``_follow`` does
    chain   writes what is next, as ``_chain`` does
    """

    def __init__(self, batch: InputBatch, known: str, number: int, size: int, length: int, follow: Any, chain: Any):
        """``known``: of ``batch.known``. ``number``: of the source. ``size``: of a state. ``length``: of chains."""
        self._batch, self._known, self._number, self._length = batch, batch.known[known], number, length
        self._follow, self._chain = follow, chain
        self._state = np.zeros((batch.count, size), np.int64)
        self._followed = np.zeros(batch.count, np.int64)  # tokens of a slot's text
        self._epoch = np.full(batch.count, -1)  # admission numbers

    def forces(self, load: StepContext) -> bool:
        return bool(self._known.has[load.slots[load.max_draft_len > 0]].any())

    def propose(self, load: StepContext) -> Chains:
        requests = np.flatnonzero(self._known.has[load.slots])
        tokens, log_p = np.full((len(requests), self._length), -1), np.zeros((len(requests), self._length))
        for row, slot in enumerate(load.slots[requests].tolist()):
            self._chain(self._known[slot], self._stand(slot), tokens[row], log_p[row])
        found = tokens[:, 0] >= 0
        source = np.full(len(requests), self._number, np.int8)
        return Chains(requests[found], tokens[found], log_p[found], source[found]) if found.any() else NO_CHAINS

    def _stand(self, slot: int) -> np.ndarray:
        """Return the state of the text in ``slot``, which may be another than before."""
        batch = self._batch
        state: np.ndarray = self._state[slot]
        first, length = int(batch.prompt_length[slot]), int(batch.length[slot])
        if self._epoch[slot] != batch.admitted[slot]:
            self._epoch[slot], self._followed[slot], state[:] = batch.admitted[slot], first, 0
        self._follow(self._known[slot], batch.tokens[slot], first, int(self._followed[slot]), length, state)
        self._followed[slot] = length
        return state


class PredictionSource(FollowingSource):
    """Proposes what follows in a request's prediction, as far as one verification of a request reaches.

    After k tokens in a row that agree, the next is right with probability (k + 1) / (k + 2) until the request itself
    tells more: Laplace's rule of succession. So a chain doubles with each pass, and ends where predictions of this
    request have ended before.
    """

    def __init__(self, batch: InputBatch, length: int):
        super().__init__(batch, "prediction", PREDICTION, STATE, length, _follow, _chain)


def predictions(networks: Networks, settings: GoodputSettings, acceptance: Acceptance) -> ChainSource:
    """Make the source of a bundle."""
    return PredictionSource(networks.batch, settings.per_request - 1)


def accepted(prediction: Sequence[int], answer: Sequence[int]) -> int:
    """Count tokens of an answer that were the prediction's next; neither load nor policy changes it."""
    text, state = np.array(answer, np.int32), np.zeros(STATE, np.int64)
    _follow(np.array(prediction, np.int64), text, 0, 0, len(text), state)
    return int(state[RIGHT:WRONG].sum())


@compiled("void(i8[::1], i4[::1], i8, i8, i8, i8[::1])")
def _follow(predicted: np.ndarray, text: np.ndarray, first: int, begin: int, end: int, state: np.ndarray) -> None:
    """Follow tokens ``begin`` to ``end`` of a ``text``, whose answer begins at ``first``.

    In ``state`` stand the position of the next token in the prediction, how many tokens before it agree, the last
    position that was sure, the tokens since then, and how often the next token was right and wrong after 0, 1, ...
    MATCHED that agreed. Behind a wrong one the longest match of the last tokens ahead of the sure position goes on, of
    several the first; without any, so many tokens are taken to be replaced as have come.
    """
    for i in range(begin, end):
        position, agrees = state[POSITION], min(state[AGREES], MATCHED)
        state[SINCE] += 1
        if position < len(predicted) and predicted[position] == text[i]:
            state[RIGHT + agrees] += 1
            state[POSITION] += 1
            state[AGREES] += 1
        else:
            state[WRONG + agrees] += position < len(predicted)
            state[POSITION], state[AGREES] = state[SURE] + state[SINCE], 0
            for ahead in range(state[SURE], len(predicted)):
                run = 0
                while run < min(MATCHED, i - first + 1, ahead + 1) and predicted[ahead - run] == text[i - run]:
                    run += 1
                if run > state[AGREES]:
                    state[POSITION], state[AGREES] = ahead + 1, run
                if run == MATCHED:
                    break
        if state[AGREES] >= MATCHED:
            state[SURE], state[SINCE] = state[POSITION], 0


@compiled("void(i8[::1], i8[::1], i8[::1], f8[::1])")
def _chain(predicted: np.ndarray, state: np.ndarray, tokens: np.ndarray, log_p: np.ndarray) -> None:
    """Write the next tokens, and their log P(accept), into ``tokens`` int64 [L] and ``log_p`` float64 [L]."""
    position, agrees, sure = state[POSITION], state[AGREES], 0
    for level in range(min(len(tokens), len(predicted) - position)):
        known = min(agrees + level, MATCHED)
        right, wrong = state[RIGHT + known] + known + 1 + sure, state[WRONG + known] + 1
        tokens[level], log_p[level] = predicted[position + level], np.log(right / (right + wrong))
        sure += known == MATCHED
