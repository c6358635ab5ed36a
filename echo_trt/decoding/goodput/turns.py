"""Whether a size of verifications pays: it and plain decoding take turns, and what it gains is estimated from them.

Costs in a table are of another moment: a machine whose speed changes within seconds makes what runs just then look dear
or cheap. Here a turn of one is compared with the other's on both sides of it. The better one so far is what runs, and
the other one gets a short turn as often as a hundredth of the time pays for, or sooner while it is not clear which is.
"""

from __future__ import annotations

import math

import numpy as np

PLAIN_TURN, HELD_TURN = 5, 9  # iterations of a turn, those with prompts apart
_CHANGED, _SETTLING = 1, 3  # of those, the first that do not count: another size, and drafts that catch up
_LONGEST = 4  # times a turn's iterations, after which it ends even if prompts or other loads left few that count
_APART = 64  # iterations at other loads after which turns are no longer compared with those before
_LOST = 0.01  # of the time, what turns of the one that is worse may cost
_DOUBTED = 2.0  # deviations from nothing up to which they may; the more there are, the less
_UNTRIED = 7.5  # seconds before the first turn of a size that is clearly foreseen to lose
_DEAREST = 2.0  # times what it would usually take, what a turn is believed to have cost at most
_FORESEEN = 0.2  # deviation of a log gain that the calibration foresees
_TURN, _TEXTS = 0.1, 0.4  # the same of one comparison; and of one request, whose text may be easy or hard
_OUTLIER = 2.0  # deviations: a comparison that is farther off tells no more than that
_NOISE = 0.1  # how fast it is learnt how far comparisons are off
_CHANGING, _SLOW = 3e-4, 0.02  # by which the variance grows in a second: texts and the machine change; in an iteration
_ANOTHER, _LIKE = 0.1, 1.5  # deviation of what a gain says of another load's, or of a size so many times as large
_UNSURE, _CREDIT = 0.5, 0.1  # deviations from nothing below which it is not clear which is better; seconds lent to that
_HOPELESS, _SEEN = 0.8, 2  # of plain decoding's rate or a deviation less, after so many iterations: cut short


class Turns:
    """``speculates``: whether this turn is of a ``size``, not of plain decoding. ``gain``: log of how many times plain
    decoding's rate the size has, as far as is known, and its ``variance``."""

    def __init__(self, requests: int, gain: float) -> None:
        """Of many ``requests`` turns tell more. ``gain``: what is foreseen. Plain decoding begins."""
        self.gain, self.variance, self.size = gain, _FORESEEN**2, 0
        self._texts = _TEXTS / math.sqrt(requests)
        self._least = self._noise = _TURN**2 + self._texts**2
        self._hopeless = _HOPELESS * math.exp(-self._texts)
        # Seconds lost so far to turns of the worse one, less what they may lose (_LOST of the time). A turn is charged
        # a provisional cost when it begins, which is replaced once the turn after it shows how fast the better one is.
        foreseen_to_lose = min(max(-gain / (_UNSURE * _FORESEEN), 0.0), 1.0)
        self._debt = foreseen_to_lose * (_CREDIT + _LOST * _UNTRIED)
        self._charged = 0.0  # of those, what is only thought of the last turn
        self._past: list[tuple[bool, np.ndarray]] = []  # the last two turns: whose, and sums as below
        self._begin(False, changed=True)

    def carried_to(self, requests: int) -> Turns:
        """Those of a load that is a step away: what is known here nearly holds there."""
        turns = Turns(requests, self.gain)
        turns.variance = self.variance + _ANOTHER**2
        turns._begin(turns.gain > 0, changed=True)
        return turns

    def resume(self, away: int) -> None:
        """Other loads came between, for ``away`` iterations. The turn that they cut short goes on; where they lasted,
        what ran before is not beside what runs now, and the better one begins."""
        if away > _APART:
            self._past.clear()
            self._begin(self.gain > 0, changed=True)
        else:
            self._skipped = _SETTLING if self.speculates else _CHANGED
            self._left += self._skipped

    def hold(self, size: int) -> None:
        """The size is this one from now on."""
        if self.size and not 1 / _LIKE < size / self.size < _LIKE:
            self.variance += _ANOTHER**2
        if size != self.size:
            self._skipped = max(self._skipped, _CHANGED)
        self.size = size

    def _begin(self, speculates: bool, changed: bool) -> None:
        self.speculates = speculates
        self._sums = np.zeros((2, 2))  # seconds, tokens a request: of all iterations, and of those that count
        self._left = HELD_TURN if speculates else PLAIN_TURN
        self._skipped = changed * (_SETTLING if speculates else _CHANGED)
        self._longest = _LONGEST * self._left

    def tick(self) -> bool:
        """An iteration comes, with prompts or without. Whether the turn has had all of its own, or is without hope."""
        self._longest -= 1
        return self._left <= 0 or self._longest < 0

    def spent(self, seconds: float, progress: float) -> None:
        """An iteration of this turn, without prompts, took ``seconds`` for ``progress`` tokens a request."""
        self._left, self._skipped = self._left - 1, self._skipped - 1
        self._sums[: 1 + (self._skipped < 0)] += seconds, progress
        self.variance += _CHANGING * min(seconds, _SLOW)
        if self.speculates == (self.gain > 0):
            doubt = _DOUBTED * math.sqrt(self.variance) / max(abs(self.gain), 1e-9)
            self._debt = max(self._debt - _LOST * min(doubt, 1.0) * seconds, 0.0)
        if self.speculates and self._skipped <= -_SEEN and self._past and not self._past[-1][0]:
            (plain, before), (taken, tokens) = self._past[-1][1][1], self._sums[1]
            if tokens * plain < self._hopeless * before * taken:
                self._left = 0

    def next(self) -> None:
        """The turn is over: compare it, and begin another one."""
        last = self.speculates, self._sums
        turns = [*self._past, last]
        if len(turns) == 3 and turns[0][0] == turns[2][0] != turns[1][0]:
            self._compare([sums for _, sums in turns], turns[1][0])
        self._past = turns[-2:]
        better = self.gain > 0
        unsure = abs(self.gain) < _UNSURE * math.sqrt(self.variance)
        due = self.speculates == better and self._debt <= unsure * _CREDIT
        if due:  # until its cost is known, and in case it never is: prompts may leave nothing to compare
            self._charged = _LOST * _UNTRIED
            self._debt += self._charged
        self._begin(better != due, changed=(better != due) != last[0])

    def _compare(self, turns: list[np.ndarray], speculated: bool) -> None:
        """The second of three ``turns`` is of the other one, the size if it has ``speculated``."""
        (seconds, tokens), counted = np.array(turns).transpose(1, 2, 0)[0], np.array(turns)[:, 1]
        if not counted.all():
            return  # prompts left nothing to compare
        first, seen, last = np.log(counted[:, 1] / counted[:, 0]).tolist()
        usual = (first + last) / 2
        self._learn((seen - usual) * (1 if speculated else -1))
        cost = 0.0
        if speculated != (self.gain > 0):
            there, back = seconds[1:] - tokens[1:] / np.exp([usual, last])  # the way back is a change of size, too
            cost = float(min(there + back, _DEAREST * tokens[1] / math.exp(usual)))
        self._debt, self._charged = max(self._debt - self._charged + cost, 0.0), 0.0

    def _learn(self, gain: float) -> None:
        """A comparison has shown ``gain``: a step of Kalman's filter, with the noise that comparisons have had."""
        off, allowed = gain - self.gain, self.variance + self._noise
        bounded = min(max(off, -_OUTLIER * math.sqrt(allowed)), _OUTLIER * math.sqrt(allowed))
        share = self.variance / allowed
        self.gain += share * bounded
        self.variance *= 1 - share
        self._noise = max(self._noise + _NOISE * (min(off * off, 2 * _OUTLIER**2 * allowed) - allowed), self._least)
