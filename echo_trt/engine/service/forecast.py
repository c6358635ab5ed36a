"""What a request has to expect as things stand: seconds to its first token, and per token behind it.

The seconds per token are those of late of requests like it, with a target or without, at the load that it makes. The
first token waits for a slot, and for the prompts that are to be computed before its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from echo_trt.engine.service.job import ExpectedLatency, ServiceRequest
from echo_trt.speculation.goodput.ladder import load_of

MEMORY = 0.98  # share of the past in sums over iterations; larger: steadier, later where texts or the machine change
ERRORS = 256  # requests whose errors are known; larger: steadier, later where the load changes


class _Ratio:
    """A ratio of two fading sums."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def add(self, above: float, below: float) -> None:
        self._above, self._below = MEMORY * self._above + above, MEMORY * self._below + below

    @property
    def value(self) -> float | None:
        return self._above / self._below if self._below else None


class Forecaster:
    """Learns from iterations, on the engine's thread; any thread may ask for forecasts and errors."""

    def __init__(self) -> None:
        self._tpot: dict[tuple[bool, int], _Ratio] = {}  # by whether there is a target, and load
        self._per_prompt_token, self._per_end = _Ratio(), _Ratio()  # seconds of either
        self._errors: dict[str, deque[float]] = {"ttft": deque(maxlen=ERRORS), "tpot": deque(maxlen=ERRORS)}

    def observe(
        self, emitted: Iterable[tuple[ServiceRequest, int]], now: float, seconds: float, prompt_tokens: int
    ) -> None:
        """Learn from an iteration of ``seconds``, in which requests have emitted tokens: their numbers."""
        sums, running, ended = {True: [0.0, 0.0], False: [0.0, 0.0]}, 0, 0
        for job, tokens in emitted:
            if job.emitted is not None:
                mine = sums[job.latency.tpot is not None]
                mine[0] += now - job.emitted
                mine[1] += tokens
            job.emitted = now
            running, ended = running + 1, ended + bool(job.finish_reason)
        for targeted, (taken, came) in sums.items():
            if came:
                self._tpot.setdefault((targeted, load_of(running)), _Ratio()).add(taken, came)
        if prompt_tokens:
            self._per_prompt_token.add(seconds, prompt_tokens)
        self._per_end.add(seconds, ended)

    def forecast(
        self, prompt: int, targeted: bool, running: int, slots: int, ahead: int, tokens_ahead: int
    ) -> ExpectedLatency:
        """Forecast a request's latency.

        prompt    tokens of its prompt
        running   requests that run
        ahead     requests that wait and come before it; ``tokens_ahead`` of prompts are computed before its own
        """
        load = load_of(min(running + ahead + 1, slots))
        known = [key for key in list(self._tpot) if key[0] == targeted] or list(self._tpot)
        nearest = min(known, key=lambda key: abs(key[1] - load), default=None)
        tpot = None if nearest is None else self._tpot[nearest].value
        per_token, per_end = self._per_prompt_token.value, self._per_end.value
        beyond = max(running + ahead + 1 - slots, 0)
        if per_token is None or (beyond and per_end is None):
            return ExpectedLatency(None, tpot)
        return ExpectedLatency(beyond * (per_end or 0.0) + (prompt + tokens_ahead) * per_token, tpot)

    def ended(self, forecast: ExpectedLatency, ttft: float, tpot: float) -> None:
        """Compare a forecast with what came, in seconds."""
        for name, expected, seen in (("ttft", forecast.ttft, ttft), ("tpot", forecast.tpot, tpot)):
            if expected is not None and seen > 0:
                self._errors[name].append(abs(expected / seen - 1))

    def errors(self) -> dict[str, float | None]:
        """Return the median relative errors of the latest forecasts of ``ttft`` and ``tpot``."""
        return {name: median(found) if (found := list(errors)) else None for name, errors in self._errors.items()}
