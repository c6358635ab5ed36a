"""What the goodput policy remembers of requests and of itself: who drafts well, who fell behind, what was gained."""

from __future__ import annotations

import numpy as np

_MEMORY = 0.97  # of running means over iterations
_FADING = 0.02  # a request that is not drafted for drifts towards the mean of all by this, an iteration
_PROBING = 0.005  # share of the time that may go into seeing whether drafting would pay again
_UNSURE = 1.2  # a gain below which plain decoding is tried now and then, to compare
_COMPARED = 48  # iterations between two such trials
_CAUTION = 0.2  # how fast time becomes dearer while speculation loses
_COURAGE = 0.005  # how fast that is forgotten while there is none
_MOST_CAUTIOUS = 2.0
_PATIENCE, _LONGEST_REST = 4, 8  # plain plans after which one is left out, and how many at most
_AGEING = 0.25  # the power of what a request fell behind by which its nodes weigh more
_LIMITS = 0.8, 1.25  # of that weight
_LEAST = 1e-4  # of what a draft's best token is usually worth: a calibration may say nothing


class History:
    """promise [S]: what each slot's best first draft token is worth, as a share of what is usual."""

    def __init__(self, slots: int):
        self.promise, self._mean = np.ones(slots), 1.0
        self._progress = np.ones(slots)  # tokens an iteration, running mean
        self._idle = np.zeros(slots, np.int64)  # iterations since it was last drafted for
        self._credit = 0.0
        self._tokens = self._plain = 1e-9
        self.host_seconds = self.level_seconds = 0.0
        self.caution = 1.0
        self._since_plain = 0
        self._speculated = False  # in the last iteration
        self._quiet = np.zeros(slots + 1, np.int64)  # by load: plans in a row that were plain, up to what matters
        self._rest = self._requests = 0

    @property
    def speedup(self) -> float:
        """Expected tokens over those of plain decoding in the same time, running mean; 1 or more."""
        return max(self._tokens / self._plain, 1.0)

    def compares(self) -> bool:
        """Whether this iteration should be plain: what that takes must stay known where the gain is small."""
        self._since_plain += 1
        due = self._since_plain >= _COMPARED and self._tokens < _UNSURE * self._plain
        if due:
            self._since_plain = 0
        return due

    def rests(self, requests: int) -> bool:
        """Whether to do without a plan: where many in a row were plain, at the same load, the next one will be."""
        if requests != self._requests:
            self._requests, self._rest = requests, 0
        self._rest -= 1
        return self._rest >= 0

    def planned(self, speculates: bool) -> None:
        """What the plan came to; each that is plain lets the next one wait a little longer."""
        quiet = self._quiet[self._requests]
        quiet = quiet // 2 if speculates else min(quiet + 1, _PATIENCE * _LONGEST_REST)
        self._quiet[self._requests] = quiet
        self._rest = int(quiet // _PATIENCE)

    def decided(self, levels: int, seconds: float) -> None:
        """Deciding on ``levels`` draft levels has taken ``seconds`` beside their passes."""
        if levels:
            self.level_seconds += (1 - _MEMORY) * (seconds / levels - self.level_seconds)

    def forget(self, slot: int) -> None:
        """Another request begins in ``slot``."""
        self.promise[slot], self._progress[slot], self._idle[slot] = self._mean, self._progress.mean(), 0

    def weights(self, slots: np.ndarray) -> np.ndarray:
        """[B] above 1 for requests that have progressed less than the others, below 1 for those that have more."""
        progress = self._progress[slots]
        if len(slots) < 2:
            return np.ones(len(slots))
        low, high = _LIMITS
        weights: np.ndarray = np.minimum(np.maximum((progress.mean() / progress) ** _AGEING, low), high)
        return weights

    def begin(self, slots: np.ndarray) -> None:
        """An iteration that could draft for ``slots`` [B] begins."""
        self._idle[slots] += 1
        self.promise[slots] += _FADING * (self._mean - self.promise[slots])

    def drafted(self, chosen: np.ndarray, best: np.ndarray, usual: float) -> None:
        """Slots ``chosen`` [A] were drafted for; the best token of each is worth ``best`` [A]."""
        seen = best / max(usual, _LEAST)
        self._idle[chosen] = 0
        self.promise[chosen] += 0.3 * (seen - self.promise[chosen])
        self._mean += (1 - _MEMORY) * (float(seen.mean()) - self._mean)

    def probe(self, requests: np.ndarray, slots: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Of ``requests`` [A] that the credit pays for, ``seconds`` [A] each, the one that waited longest; or none."""
        requests = requests[seconds <= self._credit]
        if len(requests) == 0:
            return requests
        self._credit = 0.0
        longest = self._idle[slots[requests]].argmax()
        return requests[longest : longest + 1]

    def observe(
        self,
        slots: np.ndarray,
        progress: np.ndarray,
        expected: float,
        seconds: float,
        host: float,
        plain: float,
        prompts: bool,
    ) -> None:
        """An iteration: tokens of each request [B], those expected, what it took and what a plain one would take.

        If a speculative iteration, with the slower plain one that may follow it, takes longer than plain decoding would
        for the same tokens, time becomes dearer (``caution``) until speculation stops losing. One that computed
        ``prompts`` too says nothing of speed.
        """
        self._progress[slots] += (1 - _MEMORY) * (progress - self._progress[slots])
        self._credit += _PROBING * seconds
        if prompts or len(slots) == 0:
            return
        self.host_seconds += (1 - _MEMORY) * (host - self.host_seconds)
        speculated, self._speculated = self._speculated, expected > len(slots)
        lost = 1 - expected * plain / (len(slots) * seconds)
        if not self._speculated:
            self._since_plain = 0
            self.caution -= _COURAGE * (self.caution - 1)
            lost = max(lost, 0.0) * speculated  # the way back from it, to a pass of another size
        if lost:
            self.caution = min(max(self.caution + _CAUTION * lost, 1.0), _MOST_CAUTIOUS)
        self._tokens = _MEMORY * self._tokens + expected
        self._plain = _MEMORY * self._plain + len(slots) * seconds / plain
