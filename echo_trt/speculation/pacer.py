"""Whose requests are in the next pass: by latency targets, and where there are none, by what tenants are owed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from echo_trt.speculation.shares import TenantShares

#: Seconds after which a request goes before all that come later, whatever its target. Larger: requests without a target
#: wait longer for a slot behind those with targets, which come by when their first token is due.
PATIENCE = 5.0
#: Share of the time to the first token after which prompts are computed in the largest chunks, whoever decodes. Larger:
#: running requests are held up less, and a first token comes later.
HASTE = 0.5
SMALLEST_CHUNK = 3  # prompt tokens: of fewer one could be a single token, which is rounded differently
#: Seconds of a pass with prompt tokens at most, where others decode: their longest gap between tokens. Larger: fewer
#: passes, so that a prompt takes a few per cent less time.
LONGEST_GAP = 0.5
#: Prompt tokens of the first such pass, whose time nobody knows yet, and of the shortest one: fewer do not pay.
FIRST_CHUNK, LEAST_CHUNK = 64, 32
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


@dataclass(frozen=True)
class Seats:
    """Whose requests are in a pass, B that decode and P whose prompts are computed.

    decoding  int64 [B], slots
    context   int64 [B], their cached tokens
    prompts   int64 [P], slots, the first one first
    chunk     prompt tokens that are computed at most
    shared    whether the first prompt leaves a part of the chunk to the others
    pace      how those that decode keep their latency targets; None: they have none
    """

    decoding: np.ndarray
    context: np.ndarray
    prompts: np.ndarray
    chunk: int
    shared: bool = True
    pace: Pace | None = None

    def of(self, seated: np.ndarray) -> Seats:
        """Return the seats of the decoding requests ``seated``, bool [B], and all prompts."""
        pace = self.pace and Pace(*(column[seated] for column in vars(self.pace).values()))
        return replace(self, decoding=self.decoding[seated], context=self.context[seated], pace=pace)

    def within(self, found: Seats) -> Seats:
        """Return the part of these seats that a policy has ``found`` best; of an empty pass nothing would come."""
        seated, chunk = np.isin(self.decoding, found.decoding), int(found.chunk) or self.chunk
        seats = self.of(seated) if seated.any() else self
        return replace(seats, chunk=min(max(chunk, SMALLEST_CHUNK), self.chunk))


class Pacer:
    """Says whose requests are in the next pass, from what slots' requests wait for; times are seconds of one clock.

    Where nobody has a target, and no tenant is owed anything, everybody is in it.
    """

    def __init__(self, slots: int):
        self._wanted, self._started, self._tokens, self._due = np.zeros((4, slots))
        self._hurry = np.full(slots, np.inf)  # from when on a prompt must not wait for others
        self._waited, self._given = np.zeros(slots, np.int64), np.zeros(slots, bool)
        self._tenant, self._shares = np.full(slots, b"", object), TenantShares()
        self._requests = Counter[bytes]()  # by tenant
        self._absent = np.zeros(0, np.int64)  # slots that sit out the pass that was admitted last
        self._chunk = FIRST_CHUNK  # prompt tokens that a pass computes in LONGEST_GAP

    def begin(
        self,
        slot: int,
        latency: Latency,
        arrived: float,
        started: float | None = None,
        tokens: int = 0,
        tenant: bytes = b"",
    ) -> None:
        """Begin a request. ``started``, ``tokens``: when its first token came, and tokens behind that one, if any."""
        self._wanted[slot] = 1 / max(latency.tpot, 1 / FASTEST) if latency.tpot else 0.0
        self._due[slot] = latency.due(arrived)
        self._hurry[slot] = arrived + HASTE * latency.ttft if latency.ttft else np.inf
        self._started[slot], self._tokens[slot] = (np.nan, 0) if started is None else (started, tokens)
        self._waited[slot], self._given[slot] = 0, latency.ttft is not None or latency.tpot is not None
        self._tenant[slot] = tenant
        self._requests[tenant] += 1

    def end(self, slot: int) -> float | None:
        """Forget a request; return when its first token came, None: it has not."""
        self._given[slot] = False
        self._requests[tenant := self._tenant[slot]] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]
            if self._requests:
                self._shares.forget(tenant)
        started = float(self._started[slot])
        return None if np.isnan(started) else started

    def admit(self, seats: Seats, ask: Callable[[Seats], Seats | None], now: float) -> Seats:
        """Return the part of ``seats`` that is in the next pass.

        With latency targets prompts come by when they are due, and the policy, which ``ask`` asks, may let requests
        without a target sit out, or shorten the chunk; None: it does neither. Without, tenants share passes. Where
        somebody decodes, a chunk takes LONGEST_GAP at most, as far as earlier passes tell.
        """
        if len(seats.decoding):
            seats = replace(seats, chunk=min(seats.chunk, self._chunk))
        decoding, prompts, self._absent = seats.decoding, seats.prompts, self._absent[:0]
        if not self._given.any():
            if len(self._requests) < 2:
                return seats
            owed = self._shares.seats(self._tenant[np.concatenate((decoding, prompts))])
            return (
                seats
                if owed is None
                else replace(seats.of(owed[: len(decoding)]), prompts=prompts[owed[len(decoding) :]])
            )
        prompts = prompts[np.argsort(self._due[prompts], kind="stable")]
        # A long prompt without a target, which is due after PATIENCE, must not hold up all that come later.
        seats = replace(seats, prompts=prompts, shared=not self._given[prompts[:1]].any())
        if (pace := self.pace(decoding, now)) is None:
            return seats
        seats = replace(seats, pace=pace)
        found = ask(seats) or seats
        self._absent = np.setdiff1d(decoding, found.decoding)
        hurries = bool((self._hurry[prompts] < now).any())
        return replace(found, chunk=seats.chunk) if hurries else found

    def pace(self, slots: np.ndarray, now: float) -> Pace | None:
        """Return how decoding ``slots`` int64 [B] keep their targets; None: they have none."""
        wanted = self._wanted[slots]
        if not wanted.any():
            return None
        due = (now - np.nan_to_num(self._started[slots], nan=now)) * wanted
        return Pace(wanted, np.where(wanted > 0, due - self._tokens[slots], 0.0), self._waited[slots])

    def emitted(self, slots: np.ndarray, tokens: np.ndarray, now: float) -> None:
        """Note what a pass has emitted: ``tokens`` int64 [B] of ``slots`` int64 [B]."""
        new = slots[np.isnan(self._started[slots])]
        self._started[new] = now
        self._tokens[slots] += tokens
        self._tokens[new] -= 1  # from the first token on
        self._waited[slots] = 0

    def ran(self, slots: np.ndarray, rows: np.ndarray, seconds: float, prompt_tokens: int = 0) -> None:
        """Note the admitted pass: ``rows`` int64 [C] of requests in ``slots`` int64 [C], and its ``seconds``."""
        self._waited[self._absent] += 1
        # A short chunk says little of a long one, but that it took too long.
        if prompt_tokens >= self._chunk or (prompt_tokens and seconds > LONGEST_GAP):
            self._chunk = max(int(prompt_tokens * LONGEST_GAP / seconds), LEAST_CHUNK)
        if len(self._requests) > 1:
            self._shares.observe(self._tenant[slots], rows, seconds)
