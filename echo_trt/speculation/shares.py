"""Tenants share passes: of n tenants that have requests, each is served at least 1/n as fast as alone.

A pass of all is everybody's gain as long as it takes at most n times as long as a pass of one tenant. Where it takes
longer, since another tenant brings many rows, the slowed tenant is owed time, and gets passes of its own until that is
paid: start-time fair queueing (Goyal et al., 1996), by seconds that a tenant's rows would take alone. On a device that
computes many rows as fast as a few nobody is owed anything, and passes stay whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MEMORY = 0.995  # of what a pass weighs, per later pass; larger: times are steadier, and a change is seen later


class PassSeconds:
    """The seconds of a pass by its rows: a straight line through the latest passes and, as weak as one, the origin.

    While all passes have had as many rows, half of them seem to take half the time, so it will be tried.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # of weights, rows, rows squared, seconds, and rows times seconds

    def observe(self, rows: int, seconds: float) -> None:
        self._sums = MEMORY * self._sums + (1, rows, rows * rows, seconds, rows * seconds)

    def __call__(self, rows: int) -> float:
        weight, sum_rows, squares, seconds, products = self._sums.tolist()
        weight += 1  # the origin
        spread = weight * squares - sum_rows**2
        slope = max((weight * products - sum_rows * seconds) / spread, 0.0) if spread else 0.0
        return float(max(seconds + slope * (weight * rows - sum_rows), 0.0) / weight)


class TenantShares:
    """Says whose requests are in the next pass, and keeps what each tenant is owed, in seconds of passes of its own."""

    def __init__(self) -> None:
        self._owed: dict[Any, float] = {}
        self._alone: dict[Any, float] = {}  # seconds of a tenant's rows in a pass of their own; missing: never seated
        self._seconds = PassSeconds()

    def seats(self, tenants: np.ndarray) -> np.ndarray | None:
        """Say which requests of ``tenants`` [B] are in the next pass, bool [B]; None: all of them.

        A tenant that has just come is served at once, and then owed nothing.
        """
        present = set(tenants.tolist())
        if self._owed.keys() != present:
            self._owed = {tenant: self._owed.get(tenant, 0.0) for tenant in present}
            self._alone = {tenant: time for tenant, time in self._alone.items() if tenant in present}
        late = {tenant for tenant, owed in self._owed.items() if owed > self._alone.get(tenant, -1.0)}
        return np.array([tenant in late for tenant in tenants.tolist()]) if late and late != present else None

    def forget(self, tenant: Any) -> None:
        """Forget a tenant that has left; one that is alone then owes nobody."""
        self._alone.pop(tenant, None)
        self._owed.pop(tenant, None)
        if len(self._owed) < 2:
            self._owed = {}

    def observe(self, tenants: np.ndarray, rows: np.ndarray, seconds: float) -> None:
        """Note a pass: ``rows`` int64 [C] of requests of ``tenants`` [C]."""
        self._seconds.observe(int(rows.sum()), seconds)
        for tenant in set(tenants.tolist()):
            self._alone[tenant] = self._seconds(int(rows[tenants == tenant].sum()))
            self._owed[tenant] = self._owed.get(tenant, 0.0) - self._alone[tenant]
        for tenant, owed in self._owed.items():
            self._owed[tenant] = max(owed + seconds / len(self._owed), 0.0)
