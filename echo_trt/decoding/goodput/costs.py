"""What a pass costs on this machine: T(N, context), as a table that follows the machine while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from echo_trt.decoding.arrays import compiled

NEAR, FAR = 0.2, 0.5  # how far, in log N, one measurement speaks for other sizes
_FRESH = 64.0  # passes for which what one size has taken lately is not put in doubt by what another takes
_REFRESHED = 0.25  # of that doubt, what a pass of the size itself takes away
_STALE = 3.0  # times as fast as usual a size is learnt that has not been seen for long
_LEARNING = 0.1  # the same from slower and from faster passes: a throughput is of means
_REVERTING = 0.01  # of what a size not seen for long differs from the one just seen, apart from the measured shape
_REDRAWN = 0.02  # changes, added up, after which the table is drawn again
_OUTLIER = 0.3  # a pass that took e^0.3 of what it should tells no more than that: something else ran
_GLITCH = 1.0  # nor does one that took e^-1 of it
_STAYS = 0.75  # how likely a pass of another size is followed by one of that size, before that is known
_SETTLING, _FORGETTING = 0.1, 0.01  # how fast that is learnt of each size, and forgotten
_SIZES = 256  # tokens from which on sizes are not told apart in this
_CHANGING = 0.1  # of a pass: by how much more or less than foreseen a change of size is believed to have cost
_LEAST_CHANGE = 1e-6  # seconds: where a change of size has a price it goes on being measured
_FEW = 64  # tokens of a draft's pass that is mostly its weights
_COLDEST = 4.0  # passes of one token that a cold cache may cost


class Curve:
    """Seconds of a pass over N tokens whose requests have ``context`` cached tokens in all.

    T(N, context) = base(N) + per_context * context. A tree's nodes attend its request's context again: ``per_node``
    seconds a node and cached token. ``base`` is measured at a few sizes, straight between them, and made monotone; else
    nothing is assumed of its shape, since kernels change with N and the curve has steps. ``observe`` follows the
    machine: sizes near a measured one are corrected with it. With ``together`` those far away follow it, too: larger
    ones by as many seconds, since it is memory that changes its speed, and each pass waits for that once; smaller ones
    by the ratio.
    If only the size that runs were corrected, every other one, plain decoding's included, would look too cheap once the
    machine slows down, and the held size would wrongly seem to lose. But what another size has taken a few passes ago
    stands: a difference to it is the curve's shape then, not the machine's speed.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seconds: Sequence[float],
        per_context: float = 0.0,
        per_node: float = 0.0,
        reach: float = FAR,
        together: bool = False,
    ):
        """``sizes`` [m] ascending, from 1; ``seconds`` [m]. ``reach``: NEAR for slopes, FAR for levels."""
        self._reach = reach
        self.sizes, self.per_context, self.per_node = np.asarray(sizes, np.int64), per_context, per_node
        self._measured = np.asarray(seconds, np.float64)
        self._correction = np.zeros(len(self.sizes))  # log of what the measured values are multiplied by
        self._together = together
        self._ages = np.full(len(self.sizes), 4 * _FRESH)  # passes since each was observed, about
        self._draw(int(self.sizes[-1]))

    @property
    def seconds(self) -> np.ndarray:
        """base at ``sizes`` as it stands now, monotone."""
        return _corrected(self._measured, self._correction)

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
        table = self._correction, self._measured, self.sizes, self._ages
        self._pending += _correct(*table, tokens, self._reach, self._together, base, error)
        if self._pending > _REDRAWN:
            self._draw(len(self._dense) - 1)

    def _draw(self, upto: int) -> None:
        self._dense, self._pending = _dense(self.sizes, self.seconds, upto), 0.0


@compiled("f8[::1](f8[::1], f8[::1])")
def _corrected(measured: np.ndarray, correction: np.ndarray) -> np.ndarray:
    seconds, longest = np.empty(len(measured)), 0.0
    for i in range(len(measured)):
        longest = max(longest, measured[i] * math.exp(correction[i]))
        seconds[i] = longest
    return seconds


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


@compiled("f8(f8[::1], f8[::1], i8[::1], f8[::1], i8, f8, b1, f8, f8)")
def _correct(
    correction: np.ndarray,
    measured: np.ndarray,
    sizes: np.ndarray,
    ages: np.ndarray,
    tokens: int,
    reach: float,
    together: bool,
    base: float,
    error: float,
) -> float:
    """Correct sizes near ``tokens``, which took ``base`` seconds, e^``error`` times what they should. By how much."""
    nearest = np.abs(sizes - tokens).argmin()
    stale = 1 - math.exp(-ages[nearest] / _FRESH)
    step = _LEARNING * (1 + (_STALE - 1) * stale) * min(max(error, -_GLITCH), _OUTLIER)
    longest, level = 0.0, correction[nearest]  # the former of this size and smaller ones, as corrected so far
    for i in range(len(sizes)):
        longest = max(longest, measured[i] * math.exp(correction[i]))
        own = math.exp(-0.5 * (math.log(sizes[i] / tokens) / reach) ** 2)  # 1 of this size and 0 of quite another
        follows = min(measured[nearest] / measured[i], 1.0) if together else 0.0
        stale = 1 - math.exp(-ages[i] / _FRESH)
        weight = own + max(follows - own, 0.0) * stale
        if together:
            correction[i] += _REVERTING * stale * (1 - own) * (follows * level - correction[i])
        ages[i] = (ages[i] + 1) * (1 - _REFRESHED * own)
        if step < 0 and sizes[i] < tokens and longest > base:  # fewer tokens cannot take longer than these did
            weight = 1.0
        correction[i] += step * weight
    return abs(step)


@compiled("void(f8[::1], i8, b1)")
def _settle(stays: np.ndarray, size: int, stayed: bool) -> None:
    """A pass of ``size`` was followed by one that ``stayed`` at it, or did not."""
    for i in range(len(stays)):
        stays[i] += _FORGETTING * (_STAYS - stays[i])
    stays[size] += _SETTLING * (stayed - stays[size])


@dataclass
class Costs:
    """The machine as a policy sees it: passes of the target and of the draft, in seconds.

    ``cold``: what a draft's first pass after a target's takes more, since that has driven its weights out of the cache.
    ``granule``: a verification takes as long as one of the next multiple of so many tokens; ``least``: any pass is of
    so many or more. ``change``: what a target's pass takes more that is of another size than the last one: a graph for
    any size prepares itself again.
    """

    target: Curve
    draft: Curve
    cold: float = 0.0
    granule: int = 1
    change: float = 0.0
    least: int = 1
    _size: int = 0  # of the target's last pass
    _stays: np.ndarray = field(default_factory=lambda: np.full(_SIZES + 1, _STAYS))  # by size

    def verifications(self, roots: int, nodes: np.ndarray) -> np.ndarray:
        """Seconds of a target's pass over ``roots`` tokens and so many drafted ``nodes``, integers of any shape.

        A size other than the last one is charged the switch to it and the switch back, divided by the number of passes
        that it is expected to stay in use, and twice that, since one chosen for a single plan tends to be left sooner.
        """
        sizes = self._filled(roots, nodes)
        seconds: np.ndarray = self.target.base(int(sizes.max()))[sizes]
        if self.change <= 0:
            return seconds
        left = 2 * 2 * self.change * (1 - self._stays[np.minimum(sizes, _SIZES)])
        seconds = seconds + np.where(sizes == self._size, 0.0, left)
        return seconds

    def plain(self, requests: int, context: int) -> float:
        """Seconds of the target's pass of plain decoding."""
        return self.target(max(requests, self.least), context)

    def kept(self, tokens: int, held: int) -> int:
        """Tokens that a pass of so many is filled up to, where passes have ``held`` for now: those, unless to go to its
        own size and back takes less; 0 where an engine takes passes as they come."""
        more = self.target(held) - self.target(max(tokens, self.least))
        return held if self.granule > 1 and tokens <= held and more < 2 * self.change else 0

    def _filled(self, roots: int, nodes: np.ndarray) -> np.ndarray:
        """Tokens that such a pass is filled up to."""
        sizes = roots + nodes
        if self.granule > 1:
            sizes = np.where(nodes > 0, sizes + -sizes % self.granule, sizes)
        return np.maximum(sizes, self.least)

    def observe_target(
        self, tokens: int, context: int, seconds: float, node_context: int = 0, prompts: int = 0
    ) -> None:
        """The target's pass has taken ``seconds``; arguments as in ``Curve.observe``, which hears of usual ones.

        ``prompts`` of the tokens are prompts', whose attention is another: such a pass says nothing of others.
        """
        if node_context:
            tokens += -tokens % self.granule
        tokens = max(tokens, self.least)
        last, self._size = self._size, tokens
        if prompts:
            return
        if last:
            _settle(self._stays, min(last, _SIZES), tokens == last)
        if tokens == last or self.change == 0:
            self.target.observe(tokens, context, seconds, node_context)
        else:
            usual = self.target(tokens, context) + self.target.per_node * node_context
            # Bounded alike on both sides, so that what else ran now and then does not add up.
            bound = max(self.change, _CHANGING * usual)
            more = _LEARNING * min(max(seconds - usual - self.change, -bound), bound)
            self.change = max(self.change + more, _LEAST_CHANGE)

    def observe_draft(self, tokens: int, context: int, seconds: float, first: bool) -> None:
        """A draft pass has taken ``seconds``; one of many tokens, after a prompt, hardly notices the cache."""
        if first and tokens <= _FEW:
            more = seconds - self.draft(tokens, context)
            self.cold += _LEARNING * (min(max(more, 0.0), _COLDEST * self.draft(1)) - self.cold)
        else:
            self.draft.observe(tokens, context, max(seconds - first * self.cold, 1e-6))
