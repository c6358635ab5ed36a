"""What a pass costs on this machine: T(N, context), as a table that a learner corrects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.arrays import next_size


class Curve:
    """Seconds of a pass over N tokens whose requests have ``context`` cached tokens in all.

    T(N, context) = base(N) + per_context * context. A tree's nodes attend its request's context again: ``per_node``
    seconds per node and cached token. ``base`` is measured at a few sizes, straight between them, and made monotone;
    else nothing is assumed of its shape, since kernels change with N and the curve has steps.
    """

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float], per_context: float = 0.0, per_node: float = 0.0):
        """Begin with ``seconds`` float64 [m] of ``sizes`` int64 [m], ascending from 1."""
        self.sizes, self.per_context, self.per_node = np.asarray(sizes, np.int64), per_context, per_node
        self._measured = np.asarray(seconds, np.float64)
        self.correction = np.zeros(len(self.sizes))  # log of what the measured values are multiplied by
        self._draw(int(self.sizes[-1]))

    @property
    def seconds(self) -> np.ndarray:
        """base at ``sizes`` as it stands now, monotone: float64 [m]."""
        seconds: np.ndarray = np.maximum.accumulate(self._measured * np.exp(self.correction))
        return seconds

    def base(self, upto: int) -> np.ndarray:
        """Return base(0), base(1), ..., base(upto): float64 [upto + 1] or longer. base(0) is 0: no pass."""
        if upto >= len(self._dense):
            self._draw(2 * upto)
        return self._dense

    def __call__(self, tokens: int, context: int = 0, node_context: int = 0) -> float:
        """Return the seconds of a pass; ``node_context``: cached tokens that tree nodes attend, once for each node."""
        if not tokens:
            return 0.0
        return float(self.base(tokens)[tokens]) + self.per_context * context + self.per_node * node_context

    def correct(self, log_factors: np.ndarray) -> None:
        """Multiply the seconds of ``sizes`` by exp(``log_factors``), float64 [m]."""
        self.correction += log_factors
        self._draw(len(self._dense) - 1)

    def _draw(self, upto: int) -> None:
        """Draw base(0) to base(upto): straight between ``sizes``, beyond them as steep as their last three quarters.

        The slope is that from the largest size of a quarter of the last one's tokens or fewer.
        """
        sizes, seconds, last = self.sizes, self.seconds, int(self.sizes[-1])
        bend = max(int(np.searchsorted(4 * sizes, last, side="right")) - 1, 0)
        steep = (seconds[-1] - seconds[bend]) / (last - sizes[bend]) if len(sizes) > 1 else 0.0
        dense = np.interp(np.arange(upto + 1), sizes, seconds)
        dense[last + 1 :] = seconds[-1] + steep * np.arange(1, max(upto - last, 0) + 1)
        dense[0] = 0.0
        self._dense: np.ndarray = dense


@dataclass
class Costs:
    """The machine as a planner sees it: passes of the target and of the draft, in seconds.

    cold    extra seconds of a draft's first pass after a target's, which has driven its weights out of the cache
    change  extra seconds of a target's pass of another size than the last one: a graph for any size prepares anew
    sizes   Ascending pass sizes in tokens. A verification is padded to the next size, any other pass to at least the
            first. Empty: no padding.
    """

    target: Curve
    draft: Curve
    cold: float = 0.0
    change: float = 0.0
    sizes: tuple[int, ...] = ()

    def padded(self, tokens: int) -> int:
        """Return the tokens of a verification of ``tokens`` with its padding; beyond the last size there is none."""
        return next_size(self.sizes, tokens)

    def padded_undrafted(self, tokens: int) -> int:
        """Return the tokens of a pass of ``tokens`` that verifies nothing, with its padding."""
        return max(tokens, self.sizes[0] if self.sizes else 1)

    def verification_sizes(self, requests: int, largest: int, ratio: float) -> np.ndarray:
        """Return sizes of verifications of ``requests``, ``ratio`` apart: int64 [R], to ``largest`` or more."""
        sizes: list[int] = []
        size = requests
        while not sizes or size < largest:
            size = self.padded(max(size + 1, math.ceil(ratio * size)))
            sizes.append(size)
        return np.array(sizes)

    def verifications(self, roots: int, nodes: np.ndarray) -> np.ndarray:
        """Return seconds of passes over ``roots`` tokens and ``nodes`` drafted ones, int64 of any shape."""
        tokens = roots + nodes
        if self.sizes:
            padded = np.append(self.sizes, 0)[np.searchsorted(self.sizes, tokens)]
            tokens = np.where(nodes > 0, np.maximum(padded, tokens), self.padded_undrafted(roots))
        seconds: np.ndarray = self.target.base(int(tokens.max()))[tokens]
        return seconds

    def plain(self, requests: int, context: int) -> float:
        """Return seconds of the target's pass of plain decoding."""
        return self.target(self.padded_undrafted(requests), context)

    def padding_target(self, tokens: int, size: int) -> int:
        """Return `size` if padding to it costs less than two changes of size; else 0, the engine's choice."""
        more = self.target(size) - self.target(self.padded(tokens))
        return size if tokens <= size and more < 2 * self.change else 0
