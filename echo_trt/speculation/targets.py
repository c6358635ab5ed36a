"""Latency targets of requests, and how running requests keep them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Seconds after which a request goes before all that come later, whatever its target. Larger: requests without a target
#: wait longer for a slot behind those with targets, which come by when their first token is due.
PATIENCE = 5.0
#: Share of the time to the first token after which prompts are computed in the largest chunks, whoever decodes. Larger:
#: running requests are held up less, and a first token comes later.
HASTE = 0.5
FASTEST = 1e6  # tokens per second that a target counts as at most, so that no price overflows; no machine is faster


@dataclass(frozen=True)
class Latency:
    """Targets in seconds: until the first token, and per token behind it; None: there is none.

    name  of the class that metrics count the request in; "": in none
    """

    ttft: float | None = None
    tpot: float | None = None
    name: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Latency:
        """Read a request's ``latency``, which was checked."""
        if not given:
            return NONE
        ttft, tpot = (1e-3 * value if (value := given.get(name)) else None for name in ("ttft_ms", "tpot_ms"))
        return cls(ttft, tpot, given.get("class", "custom"))

    def due(self, arrived: float) -> float:
        """Return when the first token is due, PATIENCE at most: where slots are short, the earliest comes first."""
        return arrived + min(PATIENCE, self.ttft or PATIENCE)

    def kept(self, ttft: float, tpot: float) -> bool:
        """Say whether times, in seconds, are within the targets."""
        return (self.ttft is None or ttft <= self.ttft) and (self.tpot is None or tpot <= self.tpot)


NONE = Latency()


@dataclass(frozen=True)
class Pace:
    """How the B decoding requests of an iteration keep their targets, of which one at least has a target.

    wanted  float64 [B], tokens per second that a request's target asks for; 0: it has no target
    lag     float64 [B], tokens by which a request is behind its target; below 0: ahead
    waited  int64 [B], passes that it has sat out since its last one
    """

    wanted: np.ndarray
    lag: np.ndarray
    waited: np.ndarray

    def of(self, chosen: np.ndarray) -> Pace:
        """Return the part of requests ``chosen``, bool [B]."""
        return Pace(self.wanted[chosen], self.lag[chosen], self.waited[chosen])


class Targets:
    """The targets of running requests, by slot; times are seconds of one clock."""

    def __init__(self, slots: int):
        self._wanted, self._started, self._tokens, self._due = np.zeros((4, slots))
        self._hurry = np.full(slots, np.inf)  # from when on a prompt must not wait for others
        self._waited, self._given = np.zeros(slots, np.int64), np.zeros(slots, bool)

    def begin(self, slot: int, latency: Latency, arrived: float, started: float | None = None, tokens: int = 0) -> None:
        """Begin a request. ``started``, ``tokens``: when its first token came, and tokens behind that one, if any."""
        self._wanted[slot] = 1 / max(latency.tpot, 1 / FASTEST) if latency.tpot else 0.0
        self._due[slot] = latency.due(arrived)
        self._hurry[slot] = arrived + HASTE * latency.ttft if latency.ttft else np.inf
        self._started[slot], self._tokens[slot] = (np.nan, 0) if started is None else (started, tokens)
        self._waited[slot], self._given[slot] = 0, latency.ttft is not None or latency.tpot is not None

    def end(self, slot: int) -> float | None:
        """Forget a request; return when its first token came, None: it has not."""
        self._given[slot] = False
        started = float(self._started[slot])
        return None if np.isnan(started) else started

    def observe(self, slots: np.ndarray, tokens: np.ndarray, now: float) -> None:
        """Note what a pass has emitted: ``tokens`` int64 [B] of ``slots`` int64 [B]."""
        new = slots[np.isnan(self._started[slots])]
        self._started[new] = now
        self._tokens[slots] += tokens
        self._tokens[new] -= 1  # from the first token on
        self._waited[slots] = 0

    def sat_out(self, slots: np.ndarray) -> None:
        """Note the slots that were not in a pass although they decode."""
        self._waited[slots] += 1

    def pace(self, slots: np.ndarray, now: float) -> Pace | None:
        """Return how decoding ``slots`` int64 [B] keep their targets; None: they have none."""
        wanted = self._wanted[slots]
        if not wanted.any():
            return None
        due = (now - np.nan_to_num(self._started[slots], nan=now)) * wanted
        return Pace(wanted, np.where(wanted > 0, due - self._tokens[slots], 0.0), self._waited[slots])

    @property
    def given(self) -> bool:
        """Whether any request has a target."""
        return bool(self._given.any())

    def by_due(self, slots: np.ndarray) -> np.ndarray:
        """Order prefilling ``slots`` by when their first token is due, where any request has a target."""
        return slots[np.argsort(self._due[slots], kind="stable")] if self.given else slots

    def hurry(self, slots: np.ndarray, now: float) -> bool:
        """Say whether a prompt of ``slots`` must not wait for others any longer."""
        return bool((self._hurry[slots] < now).any())
