from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import recorded

from echo_trt.calibration.fit import observe
from echo_trt.decoding.costs import Costs, Curve
from echo_trt.decoding.policies import Policy
from echo_trt.simulation.oracle import Foresight, choose

SIZES = [1, 2, 3, 5, 8, 13, 40]
rising = st.lists(st.floats(0, 0.4), min_size=7, max_size=7).map(lambda steps: (0.2 + np.cumsum(steps)).tolist())
requests = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=3)


def by_trying_everything(copied, drafted, behind, rate, costs):
    best = -np.inf
    for depths in product(*(range(h + 1) for h in drafted)):
        levels = max(depths)
        entries = [sum(b for b, d in zip(behind, depths, strict=True) if d >= 1)]
        entries += [sum(level - 1 for d in depths if d >= level) for level in range(2, levels + 1)]
        draft = sum(costs.draft(n) for n in entries)
        most = sum(max(c, d) for c, d in zip(copied, depths, strict=True))
        for verified in range(most + 1):
            best = max(best, verified - rate * (draft + costs.target(len(copied) + verified)))
    return best


@settings(max_examples=150, deadline=None)
@given(requests=requests, rate=st.floats(0.05, 5), target=rising, draft=rising, flat=st.booleans())
def test_against_trying_everything(requests, rate, target, draft, flat):
    copied, drafted, behind = map(np.array, zip(*requests, strict=True))
    costs = Costs(Curve(SIZES, target), Curve(SIZES, [draft[0]] * 7 if flat else draft))
    choice = choose(copied, drafted, behind, rate, costs, 0)
    best = by_trying_everything(copied.tolist(), drafted.tolist(), behind.tolist(), rate, costs)
    assert choice.worth <= best + 1e-9
    if flat or len(requests) == 1:
        assert choice.worth == pytest.approx(best)
    verified = int(choice.verified.sum())
    took = choice.draft_seconds + costs.target(len(copied) + verified)
    assert choice.worth == pytest.approx(verified - rate * took)
    able = copied.copy()
    able[choice.drafted] = np.maximum(copied, drafted)[choice.drafted]
    assert (choice.verified <= able).all()


def test_foresight_sees_what_the_fit_counts_as_accepted():
    trees = recorded([30, 20, 40], levels=4, beams=2, width=3, copied=0.0)
    seen = Foresight.of(trees, Policy("goodput", 4, 2, 3))
    head = observe(trees, None, 4, 2, 3)
    deepest = np.zeros(len(trees), np.int64)
    np.maximum.at(deepest, head.tree[head.accepted], head.depth[head.accepted])
    assert (seen.drafted == np.minimum(deepest, trees.left - 1)).all()
    assert seen.drafted.max() > 1
    assert not seen.copied.any()


def test_foresight_keeps_within_the_policy():
    trees = recorded([60] * 4, levels=4, beams=2, width=3, right=1.0, copied=0.9)
    whole = Foresight.of(trees, Policy("goodput", 4, 2, 3))
    assert (whole.drafted == np.minimum(4, trees.left - 1)).all()
    assert whole.copied.max() > 2
    short = Foresight.of(trees, Policy("goodput", 4, 2, 3, per_request=3))
    assert short.drafted.max() == short.copied.max() == 2
