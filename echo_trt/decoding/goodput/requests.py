"""What the goodput policy remembers of requests: who drafts well, who fell behind; and what planning takes."""

from __future__ import annotations

import numpy as np

_MEMORY = 0.97  # of running means over iterations: more of it is steadier, and later
_CANDOUR = 0.99  # of running sums of what is expected and accepted: fewer tokens tell less
_FADING = 0.02  # by which the promise of a request that is not drafted for returns to the mean in an iteration
_PROBING = 0.005  # share of the time that goes into seeing whether drafting would pay again: more finds it sooner
_NEWEST = 0.3  # weight of a request's newest draft in its promise
_AGEING = 0.25  # power of what a request fell behind by which its nodes weigh more
_LIMITS = 0.8, 1.25  # of that weight
_LEAST = 1e-4  # of what a draft's best token is usually worth: a calibration may say nothing


class History:
    """promise [S]: what each slot's best first draft token is worth, as a share of what is usual."""

    def __init__(self, slots: int):
        self.promise, self._mean = np.ones(slots), 1.0
        self._progress = np.ones(slots)  # tokens an iteration, running mean
        self._idle = np.zeros(slots, np.int64)  # iterations since each slot was last drafted for
        self._credit = 0.0  # seconds
        self._tokens = self._plain = 1e-9
        self._expected = self._accepted = 1.0  # drafted tokens
        self.host_seconds = self.level_seconds = 0.0

    @property
    def speedup(self) -> float:
        """Expected tokens over those of plain decoding in the same time, running mean; 1 or more."""
        return max(self._tokens / self._plain, 1.0)

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
        self.promise[chosen] += _NEWEST * (seen - self.promise[chosen])
        self._mean += (1 - _MEMORY) * (float(seen.mean()) - self._mean)

    def probe(self, requests: np.ndarray, slots: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Of ``requests`` [A] that the credit pays for, ``seconds`` [A] each, the one that waited longest; or none."""
        requests = requests[seconds <= self._credit]
        if len(requests) == 0:
            return requests
        self._credit = 0.0
        longest = self._idle[slots[requests]].argmax()
        return requests[longest : longest + 1]

    def decided(self, levels: int, seconds: float) -> None:
        """Deciding on ``levels`` draft levels has taken ``seconds`` beside their passes."""
        if levels:
            self.level_seconds += (1 - _MEMORY) * (seconds / levels - self.level_seconds)

    def observe(self, slots: np.ndarray, progress: np.ndarray, seconds: float) -> None:
        """An iteration of ``seconds`` has committed ``progress`` tokens of each request [B]."""
        self._credit += _PROBING * seconds
        self._progress[slots] += (1 - _MEMORY) * (progress - self._progress[slots])

    def verified(self, expected: float, accepted: int) -> float:
        """Of drafted tokens so many were ``expected``, and ``accepted``. Returns the former as it usually comes true:
        what was accepted lately of what was expected. The draft of an uncalibrated head may promise anything."""
        self._expected = _CANDOUR * self._expected + expected
        self._accepted = _CANDOUR * self._accepted + accepted
        return expected * self._accepted / self._expected

    def spent(self, expected: float, plain: float, host: float) -> None:
        """An iteration without prompts was ``expected`` to commit so many tokens, and plain decoding would have
        committed ``plain`` in its time; ``host`` seconds of that went beside passes and planning."""
        self._tokens = _MEMORY * self._tokens + expected
        self._plain = _MEMORY * self._plain + plain
        self.host_seconds += (1 - _MEMORY) * (host - self.host_seconds)
