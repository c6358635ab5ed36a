from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import recorded

from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt_lab.calibration.observe import observe
from echo_trt_lab.simulation.oracle import choose, predict

SIZES = [1, 2, 3, 5, 8, 13, 40]
rising = st.lists(st.floats(0, 0.4), min_size=7, max_size=7).map(lambda steps: (0.2 + np.cumsum(steps)).tolist())
# Accepted without a draft; what each further level brings; entries behind.
levels = st.lists(st.integers(0, 2), max_size=3)
requests = st.lists(st.tuples(st.integers(0, 2), levels, st.integers(1, 3)), min_size=1, max_size=3)
ORACLE = GoodputSettings(max_depth=4, beams=2, width=3, per_request=64)


def by_trying_everything(ahead, draft_lag, rate, costs):
    best = -np.inf
    for depths in product(range(len(ahead[0])), repeat=len(ahead)):
        levels = max(depths)
        entries = [sum(b for b, d in zip(draft_lag, depths, strict=True) if d >= 1)]
        entries += [sum(level - 1 for d in depths if d >= level) for level in range(2, levels + 1)]
        draft = sum(costs.draft(n) for n in entries)
        maximum = sum(row[d] for row, d in zip(ahead, depths, strict=True))
        for verified in range(maximum + 1):
            best = max(best, verified - rate * (draft + costs.target(len(ahead) + verified)))
    return best


@given(requests=requests, rate=st.floats(0.05, 5), target=rising, draft=rising, flat=st.booleans())
def test_against_trying_everything(requests, rate, target, draft, flat):
    maximum = max(len(gains) for _, gains, _ in requests)
    ahead = np.array([np.cumsum([free, *gains, *[0] * (maximum - len(gains))]) for free, gains, _ in requests])
    draft_lag = np.array([entries for *_, entries in requests])
    costs = Costs(Curve(SIZES, target), Curve(SIZES, [draft[0]] * 7 if flat else draft))
    choice = choose(ahead, draft_lag, rate, costs, 0)
    best = by_trying_everything(ahead.tolist(), draft_lag.tolist(), rate, costs)
    assert choice.worth <= best + 1e-9
    if flat or len(requests) == 1:
        assert choice.worth == pytest.approx(best)
    verified = int(choice.verified.sum())
    took = choice.draft_seconds + costs.target(len(ahead) + verified)
    assert choice.worth == pytest.approx(verified - rate * took)
    able = ahead[:, 0].copy()
    able[choice.drafted] = ahead[choice.drafted, -1]
    assert (choice.verified <= able).all()


def test_foresight_sees_what_the_fit_counts_as_accepted():
    trees = recorded([30, 20, 40], levels=4, beams=2, width=3, copied=0.0)
    ahead = predict(trees, ORACLE)
    head = observe(trees, None, 4, 2, 3)
    deepest = np.zeros(len(trees), np.int64)
    np.maximum.at(deepest, head.tree[head.accepted], head.depth[head.accepted])
    deepest = np.minimum(deepest, trees.left - 1)
    assert (ahead == np.minimum(deepest[:, None], np.arange(ahead.shape[1]))).all()
    assert deepest.max() > 1
