"""Where each policy stops, and who gets what the stopped ones leave."""

import numpy as np
import pytest
from forests import nodes_of
from seeded_draft import SteadyDraft, drafted

from echo_trt.speculation.echo import gates
from echo_trt.speculation.echo.grow import grow
from echo_trt.speculation.echo.pivot import allocate
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.policies import echo_settings
from echo_trt.speculation.super_tree import SuperTree

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


def verified(draft: SteadyDraft, settings: EchoSettings) -> SuperTree:
    count = len(draft.log_q)
    tree, reach = grow(np.zeros(count), draft, settings, np.full(count, 99))
    return tree.sorted_by_request(allocate(tree, reach, settings))[0]


def levels(tree: SuperTree, request: int) -> list[int]:
    """Count verified nodes of each depth."""
    return np.bincount(tree.depth[nodes_of(tree, request)]).tolist()


# Confidence at depth d is best^d, so a gate tau at depth d stops what is at or below tau^(1/d).


@pytest.mark.parametrize(("depth", "tau"), [(1, 0.2), (2, 0.5), (4, 0.3), (5, 0.9)])
def test_a_gate_stops_exactly_what_is_not_above_its_threshold(depth, tau):
    settings = EchoSettings(max_depth=6, beams=2, width=4, per_request=64, gates={depth: tau}, budget=AMPLE)
    edge = tau ** (1 / depth)
    assert reach_of(steady(edge * 0.999, edge * 1.001), settings) == [depth - 1, 6]


def test_confidence_equal_to_the_threshold_stops():
    assert gates.passes({2: 0.25}, 2, np.array([0.25, np.nextafter(0.25, 1)])).tolist() == [False, True]


def test_between_its_gates_echo_only_grows():
    settings = echo_settings("echo", SETTINGS)  # gates at 2 and 4
    assert reach_of(steady(0.70, 0.72, 0.75), settings) == [1, 3, 6]  # 0.72^2 is above 0.5, 0.72^4 is below 0.3
    assert [depth for depth in range(1, 7) if not gates.passes(settings.gates, depth, np.array(1e-6))] == [2, 4]


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
    assert verified(steady(0.01, 0.99), settings).sizes.tolist() == [5, 5]


# -- one budget for the batch --------------------------------------------------------------------------------------


def root_gated(budget: int, width: int = 4, max_depth: int = 6) -> EchoSettings:
    return EchoSettings(max_depth=max_depth, beams=1, width=width, per_request=64, gates={1: 0.2}, budget=budget)


def test_high_load_what_the_truncated_leave_carries_the_confident_deeper():
    unsure, sure = 0.15, 0.9
    crowd = verified(steady(unsure, unsure, sure, sure), root_gated(budget=4 + 6))
    assert [levels(crowd, request) for request in range(4)] == [[1], [1], [1, 1, 1, 1], [1, 1, 1, 1]]
    all_sure = verified(steady(sure, sure, sure, sure), root_gated(budget=4 + 6))
    assert sorted(all_sure.sizes.tolist()) == [2, 2, 3, 3]


def test_a_short_budget_goes_to_the_most_confident():
    tree = verified(steady(0.5, 0.9, 0.7), root_gated(budget=3 + 2))
    assert [levels(tree, request) for request in range(3)] == [[1], [1, 1], [1, 1]]


def test_low_load_an_unsure_root_gets_a_wide_fan():
    draft = steady(0.15, width=19)
    tree = verified(draft, root_gated(budget=20, width=19))
    assert levels(tree, 0) == [1, 19]


def test_one_rule_from_low_to_high_load():
    """The same two requests: the surer one's path comes first, then the fan of the other grows with the budget."""
    shapes = {}
    for budget in (2, 3, 5, 8, 11, 14):
        tree = verified(steady(0.15, 0.95, width=8), root_gated(budget, width=8, max_depth=3))
        assert len(tree) == budget
        shapes[budget] = [levels(tree, request) for request in (0, 1)]
    assert shapes[2] == [[1], [1]]
    assert shapes[3] == [[1], [1, 1]]
    assert shapes[5] == [[1], [1, 1, 1, 1]]
    assert shapes[8] == [[1, 3], [1, 1, 1, 1]]
    assert shapes[11] == [[1, 6], [1, 1, 1, 1]]


def test_the_claimed_path_is_the_best_one():
    tree = verified(steady(0.9), root_gated(budget=1 + 4))
    assert [drafted(tree, node) for node in range(5)] == [(), (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
