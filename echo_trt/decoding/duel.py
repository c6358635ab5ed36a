"""A size of verifications against plain decoding, in turns of some iterations.

Costs in a table are of another moment: a machine whose speed changes within seconds makes what runs just then look dear
or cheap. Here each turn of the size is compared with the plain ones on both sides of it.
"""

from __future__ import annotations

import math

import numpy as np

PLAIN_TURN, HELD_TURN = 5, 9  # iterations of a turn, those with prompts apart
_CHANGED, _SETTLING = 1, 3  # of those, the first that do not count: another size, and drafts that catch up
_LONGEST = 4  # times as many iterations, all of them, end a turn that prompts leave no rest
_MOST = 6  # turns of the size after which there is a verdict
_DEVIATION, _UNKNOWN = 0.1, 0.2  # of one turn's log gain, at least; and as long as there is one alone
_TEXTS = 0.4  # the same where there is one request, whose text may be easy or hard
_OUTLIER = 0.3  # a turn that seems to have gained or lost e^0.3 more than the median tells no more than that
_HOPELESS, _SEEN = 0.8, 2  # of plain decoding's rate or a deviation less, after so many iterations: cut short
_PAYS, _LOSES, _LIKELY = 1.5, 0.5, 0.75  # deviations of the mean that settle it, and that do after the last turn


class Duel:
    """Plain decoding has the first turn and the last one. ``size``: of this turn's verifications, 0 for plain ones."""

    def __init__(self, size: int, requests: int, gain: float = 0.0, weight: float = 0.0) -> None:
        """``gain``: what earlier duels have shown, or the calibration foresees, as below, worth ``weight`` turns at
        first, and less with each turn: the last verdict is of this duel alone. Of many ``requests`` turns tell more."""
        self.size = 0
        self.gain, self.weight = gain, weight  # log of how many times plain decoding's rate the size has
        self._tried, self._known = size, (gain, weight)
        self._texts = _TEXTS / math.sqrt(requests)
        self._hopeless = _HOPELESS * math.exp(-self._texts)
        self._turns: list[np.ndarray] = []
        self._begin()

    def _begin(self) -> None:
        self._turns.append(np.zeros((2, 2)))  # seconds, tokens a request: of all iterations, and of those that count
        self._left, self._skipped = (HELD_TURN, _SETTLING) if self.size else (PLAIN_TURN, _CHANGED)
        self._longest = _LONGEST * self._left

    def over(self) -> bool:
        """To be asked before every iteration: whether the turn has had its iterations, or is without hope."""
        self._longest -= 1
        return self._left <= 0 or self._longest < 0

    def spent(self, seconds: float, progress: float) -> None:
        """An iteration of this turn, without prompts, took ``seconds`` for ``progress`` tokens a request."""
        self._left, self._skipped = self._left - 1, self._skipped - 1
        self._turns[-1] += np.array([seconds, progress]) * np.array([[1], [self._skipped < 0]])
        if self.size and self._skipped <= -_SEEN:
            (plain, before), (taken, tokens) = self._turns[-2][1], self._turns[-1][1]
            if tokens * plain < self._hopeless * before * taken:
                self._left = 0

    def turned(self) -> bool | None:
        """The turn is over. Whether the size pays; None: not known yet, and the next turn begins."""
        verdict = self._verdict() if self.size == 0 and len(self._turns) > 1 else None
        if verdict is None:
            self.size = 0 if self.size else self._tried
            self._begin()
        return verdict

    def _verdict(self) -> bool | None:
        gains, (known, weight) = self._gains(), self._known
        last = len(self._turns) > 2 * _MOST
        if len(gains) == 0:
            return known > 0 if last else None
        middle = np.median(gains)
        weight *= max(1 - len(gains) / _MOST, 0.0)
        self.weight = weight + len(gains)
        bounded = np.clip(gains, middle - _OUTLIER, middle + _OUTLIER)
        self.gain = float(bounded.sum() + known * weight) / self.weight
        least = math.hypot(_DEVIATION if len(gains) > 1 else _UNKNOWN, self._texts)
        deviation = max(float(gains.std()), least) / math.sqrt(self.weight)
        if self.gain > _PAYS * deviation or self.gain < -_LOSES * deviation or last:
            return self.gain > _LIKELY * deviation
        return None

    def _gains(self) -> np.ndarray:
        """``gain`` of each of the size's turns alone. One with prompts in all its iterations tells nothing."""
        seconds, tokens = np.array(self._turns)[:, 1].T
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = np.log(tokens / seconds)
            gains = rates[1::2] - (rates[:-1:2] + rates[2::2]) / 2
        return gains[np.isfinite(gains)]

    def losses(self) -> tuple[float, float]:
        """Seconds that the size's turns have taken more than plain ones would have, and the other way round."""
        plain, held = sum(self._turns[::2])[0], sum(self._turns[1::2])[0]
        if not (plain[1] and held[1]):
            return 0.0, 0.0
        lost = held[0] - held[1] * plain[0] / plain[1]
        return lost, -lost * plain[1] / held[1]
