"""Where each policy stops, by its settings; who gets what the stopped ones leave: test_pivot.py."""

import numpy as np
import pytest
from seeded_draft import SteadyDraft

from echo_trt.speculation.echo import gates
from echo_trt.speculation.echo.grow import grow
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.policies import echo_settings

AMPLE = 10**6
SETTINGS = {
    "budget": AMPLE,
    "per_request": 64,
    "max_depth": 6,
    "beams": 2,
    "width": 4,
    "gates": {2: 0.5, 4: 0.3},
    "fixed_threshold": 0.45,
    "static": {"depth": 3, "top_k": 2, "tokens": 5},
}


def steady(*best: float, width: int = 4) -> SteadyDraft:
    """Return a draft that gives the best child of any of request i's nodes ``best[i]``; the others are far behind."""
    return SteadyDraft([[first] + [min(first, 1 - first) / width] * (width - 1) for first in best])


def reach_of(draft: SteadyDraft, settings: EchoSettings) -> list[int]:
    """Return the depth to which each request has a claim."""
    count = len(draft.log_q)
    tree, reach = grow(np.zeros(count), draft, settings, np.full(count, 99))
    return tree.depth[reach].tolist()


# Confidence at depth d is best^d, so a gate tau at depth d stops what is at or below tau^(1/d).


def test_confidence_equal_to_the_threshold_stops():
    assert gates.passes({2: 0.25}, 2, np.array([0.25, np.nextafter(0.25, 1)])).tolist() == [False, True]


def test_fixed_has_one_threshold_at_the_same_depths():
    settings = echo_settings("fixed", SETTINGS)
    assert settings.gates == {2: 0.45, 4: 0.45}
    assert reach_of(steady(0.67, 0.68, 0.82), settings) == [1, 3, 6]


def test_dense_looks_at_every_depth():
    settings = echo_settings("dense", SETTINGS)
    assert settings.gates == pytest.approx({1: 0.5, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.3, 6: 0.3})
    # Each stops at the first depth d where best^d is not above that depth's threshold.
    assert reach_of(steady(0.49, 0.70, 0.72, 0.77, 0.83), settings) == [0, 1, 2, 4, 6]


def test_dense_without_sparse_gates_has_none():
    assert echo_settings("dense", SETTINGS | {"gates": {}}).gates == {}


def test_static_has_no_gates_and_its_own_shape():
    settings = echo_settings("static", SETTINGS)
    assert (settings.max_depth, settings.beams, settings.width, settings.per_request) == (3, 2, 2, 5)
    assert reach_of(steady(0.01, 0.99), settings) == [3, 3]
