"""Forecasts a request's latency at the current load: seconds to the first token, and per token after it.

The seconds per token are what recent requests took at this load, with a target or without, as the new one has. The
first token waits for a free slot and for the prompts ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from statistics import median

from echo_trt.engine.service.job import ExpectedLatency, Late
from echo_trt.speculation.goodput.ladder import load_of
from echo_trt.speculation.pacer import Latency

MEMORY = 0.98  # share of the past in sums over iterations; larger: steadier, later where texts or the machine change
ERRORS = 256  # requests whose errors are known; larger: steadier, later where the load changes
SURE = 0.85  # share of requests that stay within what admission reckons with; larger: more kept, more refused


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
        # Forecasts over what came
        self._ratios: dict[str, deque[float]] = {name: deque(maxlen=ERRORS) for name in ("ttft", "tpot")}

    def observe(
        self, paces: Sequence[tuple[bool, float, int]], running: int, ended: int, seconds: float, prompt_tokens: int
    ) -> None:
        """Learn from an iteration of ``seconds``, in which ``running`` requests had a slot, and some have ended.

        paces  of requests that have emitted: whether it has a target, seconds since its last tokens, and new tokens;
               of a first token the latter are 0
        """
        for targeted in (True, False):
            mine = [(taken, came) for known, taken, came in paces if known == targeted and came]
            if mine:
                ratio = self._tpot.setdefault((targeted, load_of(running)), _Ratio())
                ratio.add(sum(taken for taken, _ in mine), sum(came for _, came in mine))
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

    def refuse_late(self, expected: ExpectedLatency, wanted: Latency, others: Iterable[float], running: int) -> None:
        """Refuse a request whose targets, or those per token of ``others``, will not surely be kept. Raises Late.

        expected  what is forecast for it, beside ``running`` requests
        """
        tpot = min([*others, *([wanted.tpot] if wanted.tpot else [])], default=None)
        if tpot is not None and not wanted.tpot:  # what those who run have to expect beside one more
            expected = replace(expected, tpot=self.forecast(0, True, running, running + 1, 0, 0).tpot)
        ttft, per_token = (self._surely(name, value or 0.0) for name, value in vars(expected).items())
        if not replace(wanted, tpot=tpot).kept(ttft, per_token):
            raise Late(max(ceil(ttft - (wanted.ttft or 0.0)), 1))

    def _surely(self, name: str, seconds: float) -> float:
        """Return the seconds that a share SURE of requests with such a forecast stayed within."""
        ratios = sorted(self._ratios[name])
        return seconds / ratios[int((1 - SURE) * len(ratios))] if ratios else seconds

    def ended(self, forecast: ExpectedLatency, ttft: float, tpot: float) -> None:
        """Compare a forecast with what came, in seconds."""
        for name, expected, seen in (("ttft", forecast.ttft, ttft), ("tpot", forecast.tpot, tpot)):
            if expected and seen > 0:
                self._ratios[name].append(expected / seen)

    def errors(self) -> dict[str, float | None]:
        """Return the median relative errors of the latest forecasts of ``ttft`` and ``tpot``."""
        known = {name: list(ratios) for name, ratios in self._ratios.items()}
        return {name: median(abs(ratio - 1) for ratio in found) if found else None for name, found in known.items()}
