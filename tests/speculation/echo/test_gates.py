"""Where each policy stops, by its settings; who gets what the stopped ones leave: test_pivot.py."""

import numpy as np
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


def test_static_has_no_gates_and_its_own_shape():
    settings = echo_settings("static", SETTINGS)
    assert (settings.max_depth, settings.beams, settings.width, settings.per_request) == (3, 2, 2, 5)
    assert reach_of(steady(0.01, 0.99), settings) == [3, 3]
