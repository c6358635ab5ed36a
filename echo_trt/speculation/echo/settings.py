"""The numbers of the paper's policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from echo_trt.speculation.pack import WEIGHT_ROWS, LevelShape

#: Nodes of a level that a device expands where the budget leaves each request as many or fewer. Larger: wider trees at
#: high load, and more rows of the head for each token that is verified.
NARROW = 4
#: Levels that a wait at a gate must save a single request, on average. Larger: fewer waits, and more levels in vain.
WORTH_A_WAIT = 0.5


@dataclass(frozen=True, kw_only=True)
class EchoSettings:
    """How deep and wide to draft, where to gate, and what may be verified.

    max_depth    draft levels below the root
    beams        nodes of a level that are expanded
    width        children scored under each expanded node
    gates        depth -> threshold tau, see ``gates.passes``
    per_request  K_i, the most tokens of one request
    budget       K_max, tokens verified per iteration over the whole batch, roots included; None: not shared
    """

    max_depth: int
    beams: int
    width: int
    per_request: int
    gates: Mapping[int, float] = field(default_factory=dict)
    budget: int | None = None

    def spare(self, requests: int) -> int:
        """Return the draft tokens for which the budget has room beside one root per request."""
        if self.budget is None:
            return requests * (self.per_request - 1)
        return max(self.budget - requests, 0)

    def beams_for(self, requests: int) -> int:
        """Return the nodes of a level that a device expands for each of ``requests``.

        A budget that leaves each request few draft tokens buys little width, for which more beams would be expanded.
        There are two numbers, so that a device has few graphs.
        """
        maximum, narrow = min(self.beams, self.width), min(NARROW, self.beams, self.width)
        if self.budget is None or -(-self.spare(requests) // requests) + 1 > narrow:
            return maximum
        return narrow

    def reach(self, depth: int, requests: int, spare: int, stops: Mapping[int, float]) -> int:
        """Return the depth down to which a device drafts in one go for ``requests`` whose trees are ``depth`` deep.

        That is the next gate, where the host waits to hear which requests go on, or the depth at which their claims
        have used up the ``spare`` budget. But where levels have WEIGHT_ROWS rows or fewer, drafts go beyond gates: a
        request that a gate stops would make no level shorter, so a wait would save nothing. A single request saves
        whole levels: it waits at the gates where ``stops``, the shares of requests that end at them, are large enough.
        """
        used_up = depth - (-spare // requests)
        ends = [*(gate for gate in sorted(self.gates) if depth < gate < self.max_depth), self.max_depth]
        if self._passes_gates(requests):
            waits = self._waits(stops) if requests == 1 else ()
            return next((end for end in ends if end >= used_up or end in waits), self.max_depth)
        return min(ends[0], used_up)

    def _waits(self, stops: Mapping[int, float]) -> list[int]:
        """Return the gates at which a wait saves a single request more levels than it costs, on average."""
        waits, end = [], self.max_depth
        for gate in sorted(stops, reverse=True):
            if gate < end and stops[gate] * (end - gate) > WORTH_A_WAIT:
                waits.append(gate)
                end = gate
        return waits

    def _passes_gates(self, requests: int) -> bool:
        return requests * self.beams <= WEIGHT_ROWS

    def level_shapes(self, requests: int) -> list[LevelShape]:
        """List what a device is asked to draft in one go for ``requests``, all of a batch or a part of it."""
        gates = sorted(gate for gate in self.gates if gate < self.max_depth)
        ends, shapes = [*gates, self.max_depth], dict[LevelShape, None]()  # in order
        largest = self.beams_for(requests)  # of a larger batch, fewer
        for beams in sorted({largest, min(NARROW, largest) if self.budget else largest}):
            for depth in (0, *gates):
                further = [end for end in ends if end > depth]
                if self.budget is not None and not self._passes_gates(requests):
                    further = list(range(depth + 1, further[0] + 1))
                elif not self._passes_gates(requests):
                    further = further[:1]
                first = max(depth, 1)
                shapes |= {LevelShape(first, end - first, beams, self.width): None for end in further}
        return list(shapes)

    def max_nodes(self, requests: int) -> int:
        """Return how many of a request's nodes a device copies to the host in one go, beams among them.

        They are enough to allocate the budget. Larger: the copy takes longer.
        """
        maximum = 4 * self.per_request
        return min(maximum, max(32, 4 * self.budget // requests)) if self.budget else maximum

    @property
    def rows_per_request(self) -> int:
        """Return the most new KV rows that one request can need, to draft or to verify, root included."""
        return max(1 + self.beams * max(self.max_depth - 1, 0), self.per_request)
