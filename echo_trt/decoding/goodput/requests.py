"""Running statistics of requests: who drafts well, who fell behind; and the time that planning takes."""

from __future__ import annotations

import numpy as np

_MEMORY = 0.97  # share of the past in running means over iterations; larger: steadier, and later
_ACCEPTED_MEMORY = 0.99  # share of the past in sums of expected and accepted tokens; larger: steadier, and later
_FADING = 0.02  # step of an undrafted request's promise towards the mean; larger: drafted for again sooner
_PROBING = 0.005  # share of the time spent on probes, whether drafting would pay again; larger: finds it sooner
_NEWEST = 0.3  # weight of a request's newest draft in its promise; larger: follows its text sooner
_FAIRNESS = 0.25  # power of a request's arrears in its weight; larger: those behind get more nodes
_WEIGHTS = 0.8, 1.25  # bounds of that weight; wider: fairer, and slower
_LEAST_USUAL = 1e-4  # mean P(accept) of a root's best child, at least: a calibration may say nothing


class History:
    """Running statistics of the requests.

    promise  float64 [S]: P(accept) of a slot's best first draft token, divided by the calibration's mean
    """

    def __init__(self, slots: int):
        self.promise, self._mean = np.ones(slots), 1.0  # and its running mean over drafts
        self._progress = np.ones(slots)  # tokens an iteration, running mean [S]
        self._idle = np.zeros(slots, np.int64)  # iterations since a slot was last drafted for [S]
        self._credit = 0.0  # seconds that a probe may take
        self._tokens = self._plain = 1e-9  # fading sums of expected tokens, and of plain decoding's in the same time
        self._expected = self._accepted = 1.0  # fading sums of draft tokens
        self.host_seconds = self.level_seconds = 0.0  # of an iteration beside passes and plan; of planning a level

    @property
    def speedup(self) -> float:
        """Expected tokens divided by those of plain decoding in the same time, running mean; 1 or more."""
        return max(self._tokens / self._plain, 1.0)

    def forget(self, slot: int) -> None:
        """Begin another request in ``slot``."""
        self.promise[slot], self._progress[slot], self._idle[slot] = self._mean, self._progress.mean(), 0

    def weights(self, slots: np.ndarray) -> np.ndarray:
        """Return the weights of nodes, above 1 for requests that have progressed less than the others: float64 [B]."""
        progress = self._progress[slots]
        if len(slots) < 2:
            return np.ones(len(slots))
        lowest, highest = _WEIGHTS
        weights: np.ndarray = np.clip((progress.mean() / progress) ** _FAIRNESS, lowest, highest)
        return weights

    def begin(self, slots: np.ndarray) -> None:
        """Begin an iteration that could draft for ``slots`` int64 [B]."""
        self._idle[slots] += 1
        self.promise[slots] += _FADING * (self._mean - self.promise[slots])

    def drafted(self, chosen: np.ndarray, best: np.ndarray, usual: float) -> None:
        """Record drafts for slots ``chosen`` int64 [A]: P(accept) of their ``best`` first tokens, float64 [A].

        usual: its mean in the calibration.
        """
        seen = best / max(usual, _LEAST_USUAL)
        self._idle[chosen] = 0
        self.promise[chosen] += _NEWEST * (seen - self.promise[chosen])
        self._mean += (1 - _MEMORY) * (float(seen.mean()) - self._mean)

    def probe(self, requests: np.ndarray, slots: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Return the request whose last draft is longest ago, among requests whose probe fits the time credit.

        requests, slots int64 [A]; seconds float64 [A]: a probe's. Returns int64 [0 or 1].
        """
        requests = requests[seconds <= self._credit]
        if len(requests) == 0:
            return requests
        self._credit = 0.0
        longest = self._idle[slots[requests]].argmax()
        return requests[longest : longest + 1]

    def decided(self, levels: int, seconds: float) -> None:
        """Update the time to plan a level, after ``levels`` draft levels and ``seconds`` beside their passes."""
        if levels:
            self.level_seconds += (1 - _MEMORY) * (seconds / levels - self.level_seconds)

    def observe(self, slots: np.ndarray, progress: np.ndarray, seconds: float) -> None:
        """Update progress and the time credit, after ``seconds`` that committed ``progress`` int64 [B] tokens."""
        self._credit += _PROBING * seconds
        self._progress[slots] += (1 - _MEMORY) * (progress - self._progress[slots])

    def corrected_expectation(self, expected: float, accepted: int) -> float:
        """Record expected and accepted draft tokens. Return ``expected`` times their recent ratio.

        That is accepted to expected tokens. The draft of an uncalibrated head may promise anything.
        """
        self._expected = _ACCEPTED_MEMORY * self._expected + expected
        self._accepted = _ACCEPTED_MEMORY * self._accepted + accepted
        return expected * self._accepted / self._expected

    def spent(self, expected: float, plain: float, host: float) -> None:
        """Update the speedup and the host time after an iteration without prompts.

        expected: tokens. plain: tokens that plain decoding commits in that time. host: seconds outside passes and
        planning.
        """
        self._tokens = _MEMORY * self._tokens + expected
        self._plain = _MEMORY * self._plain + plain
        self.host_seconds += (1 - _MEMORY) * (host - self.host_seconds)
