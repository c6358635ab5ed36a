"""The bill of saved time: what plain decoding would have taken for the tokens of an iteration, less what it took."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.planner import Iteration, PlainCost
from echo_trt.speculation.sources import DRAFT, SOURCES


@dataclass
class _Load:
    """What is known of a load: passes, by their ratios to a model that does not change, and windows of plain ones.

    speed             mean log ratio of verifications, NaN before any: how slow the machine is now
    windows           of plain passes so far; factor: their mean ratio beside verifications'; variance: of it, relative
    passes, ratios    of the window that has begun
    """

    variance: float
    speed: float = math.nan
    windows: float = 0.0
    factor: float = 0.0
    passes: int = 0
    ratios: float = 0.0


class PlainClock:
    """What passes of plain decoding take at a load, as a factor of what a model says that does not change.

    Plain passes are rare, and are compared with the verifications around them, so that a machine whose speed drifts
    changes nothing. They count by windows: what is wrong by chance is the same within one, and differs between two.
    """

    def __init__(self, prior_error: float, newest: float, memory: float, warm_up: int, window: int):
        """Begin with nothing measured.

        newest   weight of a load's newest window, at least; memory: share of the past in the mean of verifications
        warm_up  passes behind a verification that do not count; window: passes that do, of a window
        """
        self._prior, self._newest, self._memory = prior_error**2, newest, memory
        self._warm_up, self._window, self._row = warm_up, window, 0
        self._loads: dict[int, _Load] = {}

    def factor(self, load: int) -> tuple[float, float] | None:
        """Return the factor of a load class and its standard error, as a share of it; None before any window."""
        known = self._loads.get(load)
        if known is None or not known.windows:
            return None
        speed = 0.0 if math.isnan(known.speed) else known.speed
        return known.factor * math.exp(speed), math.sqrt(known.variance / min(known.windows, 1 / self._newest))

    def verified(self, load: int, ratio: float) -> None:
        """Learn from a verification without prompts, which took ``ratio`` times what the model says."""
        self._row, known = 0, self._loads.setdefault(load, _Load(self._prior))
        if math.isnan(known.speed):
            known.speed = math.log(ratio)
            known.factor, known.ratios = known.factor / ratio, known.ratios / ratio
        known.speed += (1 - self._memory) * (math.log(ratio) - known.speed)

    def decoded(self, load: int, ratio: float) -> None:
        """Learn from a plain pass without prompts, likewise."""
        self._row, known = self._row + 1, self._loads.setdefault(load, _Load(self._prior))
        if self._row <= self._warm_up:
            return
        known.passes += 1
        known.ratios += ratio if math.isnan(known.speed) else ratio / math.exp(known.speed)
        if known.passes == self._window:
            known.windows += 1
            ahead, weight = known.ratios / known.passes - known.factor, max(1 / known.windows, self._newest)
            if known.windows > 1:
                known.variance += ((ahead / known.factor) ** 2 - known.variance) * weight
            known.factor += weight * ahead
            known.passes, known.ratios = 0, 0.0


class Bill:
    """Sums since the start.

    saved  float64 [sources], seconds that plain decoding would have taken beyond those that it took. Accepted tokens
           bring them, and a verification's nodes share what it took beyond a plain pass; a network pays its passes
    error  seconds by which the sum may be wrong: its standard error
    """

    def __init__(self) -> None:
        self.saved, self.error = np.zeros(len(SOURCES)), 0.0

    def charge(
        self, iteration: Iteration, kept: np.ndarray, plain: PlainCost, proposer: int = DRAFT
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add an iteration. Returns the seconds by which its B requests are ahead of plain decoding, and their errors.

        kept      int64 [B], tokens that a request's text has got
        proposer  source of the nodes that a draft proposed
        """
        tree, path, count = iteration.plan.tree, iteration.path, len(kept)
        if count == 0 or (len(tree) == count and not iteration.drafts):
            return np.zeros(count), np.zeros(count)
        seconds = plain.here + (kept - 1) * plain.each
        counts = np.bincount(tree.request[path], minlength=count)
        gained = path[ragged_arange(counts) < np.repeat(kept, counts)]
        source, drafted = np.maximum(tree.source, proposer), tree.depth > 0
        nodes = np.bincount(source[drafted], minlength=len(SOURCES)).astype(np.float64)
        if not drafted.any():
            nodes[proposer] = 1.0
        drafting = sum(each.seconds for each in iteration.drafts)
        self.saved += np.bincount(source[gained[tree.depth[gained] > 0]], minlength=len(SOURCES)) * plain.each / count
        self.saved -= (iteration.seconds - plain.here - drafting) * nodes / nodes.sum()
        self.saved[proposer] -= drafting
        self.error += plain.error * float(seconds.mean())
        return seconds - iteration.seconds, plain.error * seconds
