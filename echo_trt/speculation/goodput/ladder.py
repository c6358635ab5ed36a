"""A bandit over verification sizes: it holds the size whose measured rate is best, or plain decoding.

Its arms are plain decoding and, ascending, the sizes that a verification may have at a load. An arm's gain is the ratio
of its tokens per second to plain decoding's. Arms are compared by log gains, where an error of the machine's speed or
of the draft is a shift. The first incumbent is chosen by forecasts from the cost table and the calibration. Then log
gains are measured, in rounds of four phases:

backoff     the incumbent, for as long as trials are not worth their loss
before      a window of the incumbent
trial       a challenger
after       a window of the incumbent again, so that a machine whose speed drifts favours neither

The challenger is plain decoding, and every other time the arm with the highest upper confidence bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import numpy as np

from echo_trt.speculation.goodput.settings import GoodputTuning

UNDRAFTED = 0  # the size of plain decoding
_USUAL = GoodputTuning()

#: Returns the verification sizes to choose from, int64 [R], and forecasts of their log gains, float64 [R].
ForecastGains = Callable[[], tuple[np.ndarray, np.ndarray]]


class Ladder:
    """Holds a size at each load. ``size`` begins an iteration, and ``observe`` ends one that had no prompts."""

    def __init__(self, tuning: GoodputTuning = _USUAL, trusts: bool = False) -> None:
        """Begin with nothing measured. ``trusts``: forecasts come from a calibration; the first trial waits, too."""
        self._tuning, self._trusts = tuning, trusts
        self._bandits: dict[tuple[bool, int], _Bandit] = {}
        self._latest: dict[bool, _Bandit] = {}  # by whether tokens were priced
        self._now: _Bandit | None = None

    def size(self, requests: int, forecast: ForecastGains, priced: bool = False) -> int:
        """Return the tokens of this iteration's verification for ``requests`` requests, or UNDRAFTED.

        ``forecast`` is called where the load is new. ``priced``: requests' tokens weigh differently, so that other
        sizes are best.
        """
        key, before = (priced, load_of(requests)), self._latest.get(priced)
        if key not in self._bandits:
            known = before or self._latest.get(False)
            prior_error = known.prior_error if known else 0.0
            self._bandits[key] = _Bandit(requests, *forecast(), prior_error, self._trusts, self._tuning)
        self._now = self._latest[priced] = self._bandits[key]
        return self._now.begin(resumed=self._now is not before)

    def observe(self, tokens: float, seconds: float) -> None:
        """Learn from an iteration without prompts: its expected ``tokens`` and its ``seconds``."""
        if self._now:
            self._now.observe(tokens, seconds)

    @property
    def gain(self) -> float | None:
        """Ratio of the incumbent's tokens per second to plain decoding's at the latest load; None before any."""
        return self._now.gain if self._now else None


class Phase(Enum):
    BACKOFF, BEFORE, TRIAL, AFTER = range(4)


class _Window:
    """Consecutive iterations of one arm: the tokens and seconds of all, and of those behind the warm-up.

    due       counted iterations after which the window is over
    patience  iterations, counted or not, that the window may still have: prompts may leave none to count
    """

    def __init__(self, arm: int, due: float, warm_up: int):
        self.arm, self.due, self.patience = arm, int(due), 4 * int(due + warm_up)
        self.iterations = 0
        self.tokens = self.seconds = self.all_tokens = self.all_seconds = 0.0

    @property
    def over(self) -> bool:
        return self.iterations >= self.due or self.patience <= 0

    @property
    def log_rate(self) -> float:
        return math.log(self.tokens / self.seconds) if self.iterations else math.nan


class _Bandit:
    """The arms of one load, by index, with their log gains as far as they are known; arm 0 is plain decoding.

    interval  iterations from one trial to the next; it doubles with each trial that the incumbent wins
    """

    def __init__(
        self,
        requests: int,
        sizes: np.ndarray,
        forecast: np.ndarray,
        prior_error: float,
        trusts: bool,
        tuning: GoodputTuning,
    ):
        self._tuning = tuning
        self._sizes, self._forecast = np.append(UNDRAFTED, sizes), np.append(0.0, forecast)
        self._log_gains = np.append(0.0, forecast + prior_error)
        self._first_weight = requests / (requests + tuning.forecast_requests)  # of an arm's first comparison
        self._comparisons = np.zeros(len(self._sizes))
        self._incumbent, self._round = int(self._log_gains.argmax()), 0
        self._interval = float(tuning.trial_iterations)
        if trusts:  # the first trial waits as later ones do
            gap = self._log_gains[self._incumbent] - self._log_gains[self._challenger()]
            self._interval *= 2 ** (gap / tuning.forecast_error)
        self._warm_up = tuning.warm_up  # iterations that do not count, while drafts catch up
        self._begin_round(self._interval - tuning.window_iterations)

    @property
    def prior_error(self) -> float:
        """Log gain of the best arm above its forecast: a draft that is bad at one load is bad at others."""
        best = 1 + int(self._log_gains[1:].argmax())
        return float(self._log_gains[best] - self._forecast[best])

    @property
    def gain(self) -> float:
        return float(np.exp(self._log_gains[self._incumbent]))

    def begin(self, resumed: bool) -> int:
        if self._window.over:
            before = self._window.arm
            self._next_phase()
            resumed |= self._window.arm != before
        if resumed:
            self._warm_up = self._tuning.warm_up
        self._window.patience -= 1
        return int(self._sizes[self._window.arm])

    def observe(self, tokens: float, seconds: float) -> None:
        window = self._window
        window.all_tokens += tokens
        window.all_seconds += seconds
        self._warm_up -= 1
        if self._warm_up < 0:
            window.tokens += tokens
            window.seconds += seconds
            window.iterations += 1

    def _next_phase(self) -> None:
        if self._phase is Phase.BACKOFF:
            self._enter(Phase.BEFORE)
        elif self._phase is Phase.BEFORE:
            self._before = self._window
            self._enter(Phase.TRIAL)
        elif self._phase is Phase.TRIAL:
            self._trial = self._window
            self._enter(Phase.AFTER)
        else:
            self._begin_round(self._compare(self._before, self._trial, self._window))

    def _begin_round(self, backoff: float) -> None:
        self._enter(Phase.BACKOFF if backoff >= 1 else Phase.BEFORE, backoff)

    def _enter(self, phase: Phase, backoff: float = 0.0) -> None:
        tuning, arm, due = self._tuning, self._incumbent, min(self._interval, self._tuning.window_iterations)
        if phase is Phase.BACKOFF:
            due = backoff
        elif phase is Phase.TRIAL:
            arm, due = self._challenger(), tuning.trial_iterations
        self._phase, self._window = phase, _Window(arm, due, tuning.warm_up)

    def _compare(self, before: _Window, trial: _Window, after: _Window) -> float:
        """Learn from a trial and the incumbent's windows beside it. Returns the iterations to back off for."""
        tuning, incumbent = self._tuning, self._incumbent
        log_rate = (before.log_rate + after.log_rate) / 2
        ahead = trial.log_rate - log_rate
        if math.isnan(ahead):  # a window had prompts alone
            return 0.0
        self._learn(trial.arm, ahead)
        if self._incumbent != incumbent:
            self._interval, self._round = float(tuning.trial_iterations), 0
            return 0.0
        if ahead > tuning.margin:  # by luck, or because the incumbent loses: the same again, soon
            self._interval = float(tuning.trial_iterations)
            return 0.0
        gap = abs(self._log_gains[trial.arm] - self._log_gains[incumbent])
        lost = trial.all_seconds - trial.all_tokens / math.exp(log_rate)
        self._interval *= 2 ** (1 + gap * self._first_weight / tuning.forecast_error)
        self._round += 1
        affordable = lost / tuning.trial_cost * after.iterations / after.seconds
        return min(self._interval, affordable) - tuning.window_iterations

    def _challenger(self) -> int:
        """Return the arm to try: plain decoding, and every other time the one that promises most.

        An arm that was compared less often promises more than its log gain (an upper confidence bound).
        """
        if self._incumbent != UNDRAFTED and (self._round % 2 == 0 or len(self._sizes) == 2):
            return UNDRAFTED
        spread = 2 * self._tuning.forecast_error * np.sqrt(np.log(2 + self._round) / (1 + self._comparisons))
        bound = self._log_gains + spread
        bound[[UNDRAFTED, self._incumbent]] = -math.inf
        return int(bound.argmax())

    def _learn(self, challenger: int, ahead: float) -> None:
        """Learn that ``challenger`` was ``ahead`` of the incumbent by so much; one of them is the incumbent after it.

        Gains are relative to plain decoding, so an error measured on it changes the incumbent's gain with the opposite
        sign.
        """
        log_gains, incumbent = self._log_gains, self._incumbent
        error = ahead - (log_gains[challenger] - log_gains[incumbent])
        measured, error = (incumbent, -error) if challenger == UNDRAFTED else (challenger, error)
        self._comparisons[measured] += 1
        error *= max(self._first_weight / self._comparisons[measured], self._tuning.comparison_weight)
        shared = np.zeros(len(log_gains))
        if UNDRAFTED in (challenger, incumbent):
            # The error is of the draft and the texts, so arms that are only forecast share it, and measured ones half.
            shared[1:] = np.where(self._comparisons[1:] > 0, 0.5, 1.0)
        shared[measured] = 1.0
        log_gains += shared * error
        best = int(log_gains.argmax())
        if log_gains[best] - log_gains[incumbent] > self._tuning.margin:
            self._incumbent = best


def load_of(requests: int) -> int:
    """Return the load class of a batch size: round(2 log2 B), at least 1."""
    return max(round(2 * math.log2(requests)), 1)
