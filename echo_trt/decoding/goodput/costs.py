"""What a pass costs on this machine: T(N, context), as a table that follows the machine while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo_trt.decoding.arrays import compiled, next_size

NEAR, FAR = 0.2, 0.5  # how far, in log N, one measurement speaks for other sizes
SHARED = (
    0.5  # share of an error that all sizes have: more of it takes the machine's speed for what is off, not the shape
)
LEARNING = 0.1  # weight of the newest pass, slower or faster: a throughput is of means
OUTLIERS = -1.0, 0.3  # logs of what a pass took for what it should, beyond which it tells no more: something else ran
STEP = 1.25  # from one rung to the next, at least: smaller steps find better sizes, and take longer to
COLDEST = 4.0  # passes of one token that a cold cache may cost, at most: what else runs is no cache
FEW = 64  # tokens of a draft's pass that is mostly its weights


class Curve:
    """Seconds of a pass over N tokens whose requests have ``context`` cached tokens in all.

    T(N, context) = base(N) + per_context * context. A tree's nodes attend its request's context again: ``per_node``
    seconds a node and cached token. ``base`` is measured at a few sizes, straight between them, and made monotone; else
    nothing is assumed of its shape, since kernels change with N and the curve has steps. ``observe`` follows the
    machine: sizes near an observed one are corrected with it, and all others by a share, since it may be the machine
    that has become slower.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seconds: Sequence[float],
        per_context: float = 0.0,
        per_node: float = 0.0,
        reach: float = FAR,
    ):
        """``sizes`` [m] ascending, from 1; ``seconds`` [m]. ``reach``: NEAR for slopes, FAR for levels."""
        self._reach = reach
        self.sizes, self.per_context, self.per_node = np.asarray(sizes, np.int64), per_context, per_node
        self._measured = np.asarray(seconds, np.float64)
        self._correction = np.zeros(len(self.sizes))  # log of what the measured values are multiplied by
        self._draw(int(self.sizes[-1]))

    @property
    def seconds(self) -> np.ndarray:
        """base at ``sizes`` as it stands now, monotone."""
        return np.maximum.accumulate(self._measured * np.exp(self._correction))

    def base(self, upto: int) -> np.ndarray:
        """base(0), base(1), ..., base(upto): float64 [upto + 1] or longer. base(0) is 0: no pass."""
        if upto >= len(self._dense):
            self._draw(2 * upto)
        return self._dense

    def __call__(self, tokens: int, context: int = 0) -> float:
        return float(self.base(tokens)[tokens]) + self.per_context * context if tokens else 0.0

    def observe(self, tokens: int, context: int, seconds: float, node_context: int = 0) -> None:
        """A pass has taken ``seconds``; ``node_context``: cached tokens that its trees' nodes attend, roots apart."""
        base = max(seconds - self.per_context * context - self.per_node * node_context, 1e-6)
        error = math.log(base / self.base(tokens)[tokens])
        near = np.exp(-0.5 * (np.log(self.sizes / tokens) / self._reach) ** 2)  # 1 of this size, 0 of quite another
        self._correction += LEARNING * min(max(error, OUTLIERS[0]), OUTLIERS[1]) * (near + SHARED * (1 - near))
        self._draw(len(self._dense) - 1)

    def _draw(self, upto: int) -> None:
        self._dense = _dense(self.sizes, self.seconds, upto)


@compiled("f8[::1](i8[::1], f8[::1], i8)")
def _dense(sizes: np.ndarray, seconds: np.ndarray, upto: int) -> np.ndarray:
    """``seconds`` at ``sizes``, straight between them, at 1, 2, ... ``upto``, and 0 at 0."""
    dense, last = np.empty(upto + 1), len(sizes) - 1
    bend = last - 1  # the largest size of a quarter of the last one's tokens or fewer
    while bend > 0 and 4 * sizes[bend] > sizes[last]:
        bend -= 1
    steep = (seconds[last] - seconds[bend]) / (sizes[last] - sizes[bend]) if last else 0.0
    place = 0
    for size in range(1, upto + 1):
        while place < last and sizes[place + 1] <= size:
            place += 1
        slope = steep  # beyond the table: on, as steep as its last three quarters
        if place < last:
            slope = (seconds[place + 1] - seconds[place]) / (sizes[place + 1] - sizes[place])
        dense[size] = seconds[place] + slope * (size - sizes[place])
    dense[0] = 0.0
    return dense


@dataclass
class Costs:
    """The machine as a planner sees it: passes of the target and of the draft, in seconds.

    cold    extra seconds of a draft's first pass after a target's, which has driven its weights out of the cache
    change  extra seconds of a target's pass that has another size than the last one: a graph for any size prepares
            itself again
    sizes   tokens, ascending, to the next of which the target pads a verification, and to the first of which it pads
            any pass; empty: it pads none
    """

    target: Curve
    draft: Curve
    cold: float = 0.0
    change: float = 0.0
    sizes: tuple[int, ...] = ()
    _size: int = 0  # of the target's last pass

    def padded(self, tokens: int) -> int:
        """Tokens of a verification of ``tokens`` with its padding: beyond the last size it is as it comes."""
        return next_size(self.sizes, tokens)

    def rungs(self, requests: int, most: int) -> np.ndarray:
        """Sizes worth telling apart that verifications of ``requests`` can have: int64 [R], up to ``most`` or more."""
        rungs: list[int] = []
        size = requests
        while not rungs or size < most:
            size = self.padded(max(size + 1, math.ceil(STEP * size)))
            rungs.append(size)
        return np.array(rungs)

    def verifications(self, roots: int, nodes: np.ndarray) -> np.ndarray:
        """Seconds of a target's pass over ``roots`` tokens and so many drafted ``nodes``, integers of any shape."""
        tokens = roots + nodes
        if self.sizes:
            padded = np.append(self.sizes, 0)[np.searchsorted(self.sizes, tokens)]
            tokens = np.where(nodes > 0, np.maximum(padded, tokens), max(roots, self.sizes[0]))
        seconds: np.ndarray = self.target.base(int(tokens.max()))[tokens]
        return seconds

    def plain(self, requests: int, context: int) -> float:
        """Seconds of the target's pass of plain decoding."""
        return self.target(max(requests, *self.sizes[:1], 1), context)

    def kept(self, tokens: int, size: int) -> int:
        """Tokens to which a pass of ``tokens`` is padded where passes have ``size`` for now: that, unless to go to its
        own size and back takes less; then 0, as the engine likes."""
        more = self.target(size) - self.target(self.padded(tokens))
        return size if tokens <= size and more < 2 * self.change else 0

    def observe_target(
        self, tokens: int, context: int, seconds: float, node_context: int = 0, prompts: int = 0
    ) -> None:
        """The target's pass has taken ``seconds``; arguments as in ``Curve.observe``.

        ``prompts`` of the tokens are prompts', whose attention is another: such a pass says nothing of others, nor
        does one whose size has changed.
        """
        tokens = self.padded(tokens) if node_context else max(tokens, *self.sizes[:1], 1)
        changed, self._size = tokens != self._size, tokens
        if not prompts and not (changed and self.change > 0):
            self.target.observe(tokens, context, seconds, node_context)

    def observe_draft(self, tokens: int, context: int, seconds: float, first: bool) -> None:
        """A draft pass has taken ``seconds``; one of many tokens, after a prompt, hardly notices the cache."""
        more, few = seconds - self.draft(tokens, context), first and tokens <= FEW
        if few:
            self.cold += LEARNING * (min(max(more, 0.0), COLDEST * self.draft(1)) - self.cold)
        if not few or more < 0:  # no cache makes a pass faster than the curve says
            self.draft.observe(tokens, context, max(seconds - (first and not few) * self.cold, 1e-6))
