"""Tenants share passes: each is served at least 1/n as fast as alone, and nobody waits where waiting gains nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.speculation.shares import PassSeconds, TenantShares


def simulate(rows: dict[str, int], per_row: float, passes: int = 3000) -> tuple[dict[str, float], float]:
    """Return each tenant's speed relative to alone, and the mean rows of a pass; a pass takes 1 + per_row * rows."""
    shares, tenants = TenantShares(), np.array([*rows], object)
    served, elapsed, computed = dict.fromkeys(rows, 0), 0.0, 0
    for _ in range(passes):
        seats = shares.seats(tenants)
        seated = tenants if seats is None else tenants[seats]
        assert len(seated)
        of = np.array([rows[tenant] for tenant in seated])
        seconds = 1 + per_row * of.sum()
        shares.observe(seated, of, seconds)
        elapsed += seconds
        computed += of.sum()
        for tenant in seated:
            served[tenant] += 1
    return {t: served[t] * (1 + per_row * rows[t]) / elapsed for t in rows}, computed / passes


@given(st.lists(st.integers(1, 256), min_size=2, max_size=8), st.floats(0.0, 2.0))
def test_each_of_n_tenants_has_nearly_a_part_in_n_of_its_speed_alone(counts, per_row):
    speeds, _ = simulate({str(i): count for i, count in enumerate(counts)}, per_row)
    assert min(speeds.values()) >= 0.8 / len(counts)


def test_a_flood_halves_one_request_and_no_more():
    speeds, _ = simulate({"flood": 64, "one": 1}, 0.15)
    assert speeds["one"] > 0.45
    assert speeds["flood"] > 0.45


def test_passes_stay_whole_where_rows_cost_nothing():
    speeds, rows = simulate({"flood": 64, "one": 1}, 0.0)
    assert rows > 64
    assert min(speeds.values()) > 0.99


def test_a_tenant_that_comes_is_served_at_once():
    shares, flood = TenantShares(), np.array(["flood"] * 8, object)
    for _ in range(3):
        shares.seats(flood)
        shares.observe(flood, np.full(8, 8), 1.0)
    seats = shares.seats(np.append(flood, "one"))
    assert seats is not None
    assert seats.tolist() == [False] * 8 + [True]


@pytest.mark.parametrize("per_row", [0.0, 0.1, 3.0])
def test_seconds_of_a_pass_are_learnt(per_row):
    seconds = PassSeconds()
    for rows in (1, 64, 8, 32, 1, 2) * 40:
        seconds.observe(rows, 1 + per_row * rows)
    assert seconds(16) == pytest.approx(1 + per_row * 16, rel=0.01)
