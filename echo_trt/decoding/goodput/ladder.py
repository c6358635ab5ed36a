"""Which size verifications have at a load, or whether plain decoding is better.

The sizes that may be verified are the rungs of a ladder, and plain decoding is the lowest one. A rung's score is the
number of tokens that it is expected to commit in a second. Foreseen scores, from the cost table and the calibration,
say where to begin. From then on scores are measured: a trial of another rung runs between two windows of the present
one, so that a machine whose speed drifts favours neither. Scores are kept as logs, relative to plain decoding's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

TRIAL = 12  # iterations of a trial: more of them tell more, and lose more where they lose
WINDOW = 64  # iterations of the present rung, at most, that a trial is compared with on each side
SHARE = 0.01  # of the time that trials may lose: more of it follows changes sooner
MARGIN = 0.02  # by which another rung's score must be higher to take over: more of it flaps less
MEMORY = 0.25  # weight of the newest comparison: more of it follows changed texts sooner, and noise too
FEW = 2  # requests of which a comparison tells as much as what was foreseen: texts are easy or hard
SETTLING = 2  # iterations after a change that do not count: drafts catch up, the pass has another size
DOUBT = 0.1  # by which scores may be off, those of many requests: more of it repeats trials sooner
PATIENCE = 4  # times its iterations after which a window ends all the same: prompts may leave nothing that counts
PLAIN = 0

Foresee = Callable[[], tuple[np.ndarray, np.ndarray]]


class Ladder:
    """Holds a rung at each load. ``rung`` begins an iteration, and ``observe`` ends one that had no prompts."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._now: _Load | None = None

    def rung(self, requests: int, foresee: Foresee) -> int:
        """Return the tokens of this iteration's verification for ``requests`` requests, or PLAIN.

        ``foresee`` is called where the load is new. It returns the rungs above ``requests``, int64 [R], and their
        foreseen scores, float64 [R].
        """
        load, before = load_of(requests), self._now
        if load not in self._loads:
            self._loads[load] = _Load(requests, *foresee(), before.surprise if before else 0.0)
        self._now = self._loads[load]
        return self._now.begin(resumed=self._now is not before)

    def observe(self, tokens: float, seconds: float) -> None:
        """An iteration without prompts was expected to commit ``tokens`` and took ``seconds``."""
        if self._now:
            self._now.observe(tokens, seconds)


class _Window:
    """Iterations of one rung in a row: their tokens and seconds, and of those that count."""

    def __init__(self, rung: int, due: float):
        self.rung, self.due, self.patience = rung, int(due), PATIENCE * int(due + SETTLING)
        self.iterations = 0
        self.tokens = self.seconds = self.all_tokens = self.all_seconds = 0.0

    @property
    def over(self) -> bool:
        return self.iterations >= self.due or self.patience <= 0

    @property
    def score(self) -> float:
        return math.log(self.tokens / self.seconds) if self.iterations else math.nan


class _Load:
    """What is known of the rungs of one load."""

    def __init__(self, requests: int, rungs: np.ndarray, foreseen: np.ndarray, surprise: float):
        self._rungs, self._foreseen = np.append(PLAIN, rungs), np.append(0.0, foreseen)
        self._scores = np.append(0.0, foreseen + surprise)
        self._tells = requests / (requests + FEW)  # weight of a rung's first comparison
        self._compared = np.zeros(len(self._rungs))
        self._present = int(self._scores.argmax())
        self._turns = self._take_turns()
        self._window, self._settling = next(self._turns), SETTLING

    @property
    def surprise(self) -> float:
        """How much higher than foreseen the best rung's score is: a draft that is bad at one load is so at others."""
        best = 1 + int(self._scores[1:].argmax())
        return float(self._scores[best] - self._foreseen[best])

    def begin(self, resumed: bool) -> int:
        if self._window.over:
            before, self._window = self._window, next(self._turns)
            resumed |= self._window.rung != before.rung
        if resumed:
            self._settling = SETTLING
        self._window.patience -= 1
        return int(self._rungs[self._window.rung])

    def observe(self, tokens: float, seconds: float) -> None:
        window = self._window
        window.all_tokens += tokens
        window.all_seconds += seconds
        self._settling -= 1
        if self._settling < 0:
            window.tokens += tokens
            window.seconds += seconds
            window.iterations += 1

    def _take_turns(self) -> Iterator[_Window]:
        """Yield one window after another: trials, and between them the present rung, ever longer while it stays."""
        span, turn = TRIAL, 0
        yield (before := _Window(self._present, span))
        while True:
            yield (trial := _Window(self._rival(turn), TRIAL))
            yield (after := _Window(self._present, min(span, WINDOW)))
            usual, present, rest = (before.score + after.score) / 2, self._present, 0.0
            ahead = trial.score - usual
            if not math.isnan(ahead):
                self._learn(trial.rung, ahead)
            if self._present != present:
                span, turn = TRIAL, 0
            elif ahead > MARGIN:  # by luck, or because the present rung loses: the same again, soon
                span = TRIAL
            elif not math.isnan(ahead):
                gap = abs(self._scores[trial.rung] - self._scores[self._present])
                lost = trial.all_seconds - trial.all_tokens / math.exp(usual)
                span *= 2 ** (1 + gap * self._tells / DOUBT)
                rest = min(span, lost / SHARE * after.iterations / after.seconds) - WINDOW
                turn += 1
            if rest >= 1:
                yield _Window(self._present, rest)
            yield (before := _Window(self._present, min(span, WINDOW)))

    def _rival(self, turn: int) -> int:
        """The rung to try beside the present one: plain decoding, and every other time the most promising other one.

        A rung that has been tried less promises more than its score (an upper confidence bound).
        """
        if self._present != PLAIN and (turn % 2 == 0 or len(self._rungs) == 2):
            return PLAIN
        promising = self._scores + 2 * DOUBT * np.sqrt(np.log(2 + turn) / (1 + self._compared))
        promising[[PLAIN, self._present]] = -math.inf
        return int(promising.argmax())

    def _learn(self, rival: int, ahead: float) -> None:
        """A trial of ``rival`` was ``ahead`` of the present rung, which may be another one from now on."""
        scores, present = self._scores, self._present
        error = ahead - (scores[rival] - scores[present])
        # Plain decoding is the yardstick: where it was better or worse than thought, drafts were worse or better.
        told, error = (present, -error) if rival == PLAIN else (rival, error)
        self._compared[told] += 1
        error *= max(self._tells / self._compared[told], MEMORY)
        shared = np.zeros(len(scores))
        if PLAIN in (rival, present):  # it is the draft's and the texts' as well: what is only foreseen goes along
            shared[1:] = np.where(self._compared[1:] > 0, 0.5, 1.0)
        shared[told] = 1.0
        scores += shared * error
        best = int(scores.argmax())
        if scores[best] - scores[present] > MARGIN:
            self._present = best


def load_of(requests: int) -> int:
    """Group numbers of ``requests`` that share what is learnt of one of them: a step is a factor of 1.4, or 1 to 2."""
    return max(round(2 * math.log2(requests)), 1)
