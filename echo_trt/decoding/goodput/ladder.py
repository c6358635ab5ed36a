"""Chooses the size of verifications at a load, or plain decoding.

A rung is a number of tokens that a verification may have; the lowest one is plain decoding. A rung's gain is the ratio
of the tokens a second that it is expected to commit to plain decoding's. Rungs are compared by log gains, where an
error of the machine's speed or of the draft is a shift. Foreseen log gains, from the cost table and the calibration,
say where to begin. From then on they are measured: a trial of another rung runs between two windows of the present one,
so that a machine whose speed drifts favours neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

TRIAL = 12  # iterations of a trial; larger: trials tell more, and lose more where they lose
WINDOW = 64  # iterations of the present rung at most beside a trial; larger: less noise, and later comparisons
TRIAL_COST = 0.01  # share of the time that trials may lose; larger: follows changes sooner
MARGIN = 0.02  # log gain by which another rung must be ahead to take over; larger: flaps less
MEMORY = 0.25  # weight of the newest comparison; larger: follows changed texts sooner, and noise too
FORESEEN_REQUESTS = 2  # a forecast counts as much as a comparison of as many; larger: trials of few texts count less
SETTLING = 2  # iterations after a change that do not count, while drafts catch up; larger: trials take longer
DOUBT = 0.1  # error of foreseen log gains; larger: repeats trials sooner
PATIENCE = 4  # a window ends after as many times its iterations, with or without prompts; larger: waits longer
UNDRAFTED = 0  # the rung of plain decoding

Foresee = Callable[[], tuple[np.ndarray, np.ndarray]]


class Ladder:
    """Holds a rung at each load. ``rung`` begins an iteration, and ``observe`` ends one that had no prompts."""

    def __init__(self, trusts: bool = False) -> None:
        """``trusts``: whether foreseen log gains come of a calibration, so that a first trial can wait for its turn."""
        self._trusts = trusts
        self._loads: dict[int, _Load] = {}
        self._now: _Load | None = None

    def rung(self, requests: int, foresee: Foresee) -> int:
        """Return the tokens of this iteration's verification for ``requests`` requests, or UNDRAFTED.

        ``foresee`` is called where the load is new. It returns the rungs above ``requests``, int64 [R], and their
        foreseen log gains, float64 [R].
        """
        load, before = load_of(requests), self._now
        if load not in self._loads:
            rungs, log_gains = foresee()
            self._loads[load] = _Load(requests, rungs, log_gains, before.surprise if before else 0.0, self._trusts)
        self._now = self._loads[load]
        return self._now.begin(resumed=self._now is not before)

    def observe(self, tokens: float, seconds: float) -> None:
        """Learn from an iteration without prompts: its expected ``tokens`` and its ``seconds``."""
        if self._now:
            self._now.observe(tokens, seconds)

    @property
    def gain(self) -> float | None:
        """Ratio of the present rung's tokens a second to plain decoding's at the latest load; None before any."""
        load = self._now
        return load.gain if load else None


class _Window:
    """Consecutive iterations of one rung: the tokens and seconds of all iterations, and of the counted ones.

    index       of the rung
    due         counted iterations after which the window is over
    patience    iterations, counted or not, that the window may still have
    iterations  counted iterations so far
    """

    def __init__(self, index: int, due: float):
        self.index, self.due, self.patience = index, int(due), PATIENCE * int(due + SETTLING)
        self.iterations = 0
        self.tokens = self.seconds = self.all_tokens = self.all_seconds = 0.0

    @property
    def over(self) -> bool:
        return self.iterations >= self.due or self.patience <= 0

    @property
    def log_rate(self) -> float:
        return math.log(self.tokens / self.seconds) if self.iterations else math.nan


class _Load:
    """The rungs of one load, by index, with their log gains as far as they are known."""

    def __init__(self, requests: int, rungs: np.ndarray, foreseen: np.ndarray, surprise: float, trusts: bool):
        self._trusts = trusts
        self._rungs, self._foreseen = np.append(UNDRAFTED, rungs), np.append(0.0, foreseen)
        self._log_gains = np.append(0.0, foreseen + surprise)
        self._first_weight = requests / (requests + FORESEEN_REQUESTS)  # of a rung's first comparison
        self._compared = np.zeros(len(self._rungs))
        self._present = int(self._log_gains.argmax())
        self._turns = self._take_turns()
        self._window, self._settling = next(self._turns), SETTLING

    @property
    def surprise(self) -> float:
        """Log gain of the best rung above its foreseen one: a draft that is bad at one load is bad at others."""
        best = 1 + int(self._log_gains[1:].argmax())
        return float(self._log_gains[best] - self._foreseen[best])

    @property
    def gain(self) -> float:
        return float(np.exp(self._log_gains[self._present]))

    def begin(self, resumed: bool) -> int:
        if self._window.over:
            before, self._window = self._window, next(self._turns)
            resumed |= self._window.index != before.index
        if resumed:
            self._settling = SETTLING
        self._window.patience -= 1
        return int(self._rungs[self._window.index])

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
        """Yield windows: trials, and between them the present rung, ever longer while it stays.

        A trial stands between two windows of the present rung, ``before`` and ``after``. ``interval`` is the
        iterations from one trial to the next, which a ``pause`` of the present rung fills up.
        """
        interval, turn = TRIAL * 2 ** (self._foreseen_gap() / DOUBT), 0  # the first trial waits as later ones do
        if interval - WINDOW >= 1:
            yield _Window(self._present, interval - WINDOW)
        yield (before := _Window(self._present, min(interval, WINDOW)))
        while True:
            yield (trial := _Window(self._rival(turn), TRIAL))
            yield (after := _Window(self._present, min(interval, WINDOW)))
            present, present_log_rate, pause = self._present, (before.log_rate + after.log_rate) / 2, 0.0
            ahead = trial.log_rate - present_log_rate  # nan: a window had prompts alone
            if not math.isnan(ahead):
                self._learn(trial.index, ahead)
            if self._present != present:
                interval, turn = TRIAL, 0
            elif ahead > MARGIN:  # by luck, or because the present rung loses: the same again, soon
                interval = TRIAL
            elif not math.isnan(ahead):
                gap = abs(self._log_gains[trial.index] - self._log_gains[self._present])
                lost = trial.all_seconds - trial.all_tokens / math.exp(present_log_rate)
                interval *= 2 ** (1 + gap * self._first_weight / DOUBT)
                pause = min(interval, lost / TRIAL_COST * after.iterations / after.seconds) - WINDOW
                turn += 1
            if pause >= 1:
                yield _Window(self._present, pause)
            yield (before := _Window(self._present, min(interval, WINDOW)))

    def _foreseen_gap(self) -> float:
        """Return how far the first rival is foreseen to be behind; 0 where that is a guess."""
        return float(self._log_gains[self._present] - self._log_gains[self._rival(0)]) if self._trusts else 0.0

    def _rival(self, turn: int) -> int:
        """Return the index of the rung to try: plain decoding, and every other time the most promising other one.

        A rung that has been tried less promises more than its log gain (an upper confidence bound).
        """
        if self._present != UNDRAFTED and (turn % 2 == 0 or len(self._rungs) == 2):
            return UNDRAFTED
        promising = self._log_gains + 2 * DOUBT * np.sqrt(np.log(2 + turn) / (1 + self._compared))
        promising[[UNDRAFTED, self._present]] = -math.inf
        return int(promising.argmax())

    def _learn(self, rival: int, ahead: float) -> None:
        """Learn that a trial of ``rival`` was ``ahead`` of the present rung, which may be another one from now on."""
        log_gains, present = self._log_gains, self._present
        error = ahead - (log_gains[rival] - log_gains[present])
        # Plain decoding is the yardstick: where it was better or worse than thought, drafts were worse or better.
        told, error = (present, -error) if rival == UNDRAFTED else (rival, error)
        self._compared[told] += 1
        error *= max(self._first_weight / self._compared[told], MEMORY)
        shared = np.zeros(len(log_gains))
        if UNDRAFTED in (rival, present):
            # The error is of the draft and the texts, so rungs that are only foreseen share it, and measured ones half.
            shared[1:] = np.where(self._compared[1:] > 0, 0.5, 1.0)
        shared[told] = 1.0
        log_gains += shared * error
        best = int(log_gains.argmax())
        if log_gains[best] - log_gains[present] > MARGIN:
            self._present = best


def load_of(requests: int) -> int:
    """Return the load class of a batch size: round(2 log2 B), at least 1."""
    return max(round(2 * math.log2(requests)), 1)
