"""The numbers of the paper's policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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

    @property
    def rows_per_request(self) -> int:
        """Return the most new KV rows that one request can need, to draft or to verify, root included."""
        return max(1 + self.beams * max(self.max_depth - 1, 0), self.per_request)
