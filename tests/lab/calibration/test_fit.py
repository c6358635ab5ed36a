"""Fits against their definitions, and against data whose probabilities are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recordings import answer_of, paths_at, recording

from echo_trt.speculation.goodput.model.acceptance import KNOTS, Acceptance, knots
from echo_trt.speculation.sources import BOTH, DRAFT, LOOKUP
from echo_trt_lab.calibration.fit import PRIOR, QUANTILES, acceptance_table, children_quantiles, fit, lookup_acceptance
from echo_trt_lab.calibration.gates import auc, fit_gates, youden
from echo_trt_lab.calibration.observe import Observed, observe

labelled = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=25)


def columns(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    confidence, label = zip(*pairs, strict=True)
    return np.array(confidence), np.array(label)


@given(labelled)
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    confidence, label = columns(pairs)
    accepted, others = confidence[label], confidence[~label]
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in accepted for b in others]
    assert auc(confidence, label) == pytest.approx(np.mean(won) if won else 0.5)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.6, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1))
def test_youden_keeps_most_accepted_and_cuts_most_others(pairs):
    confidence, label = columns(pairs)
    threshold = youden(confidence, label)
    if label.all() or not label.any():
        assert threshold == (0 if label.any() else 1)
        return

    def merit(tau: float) -> float:
        kept = confidence >= tau
        return kept[label].mean() + (~kept[~label]).mean()

    best = max(merit(tau) for tau in [*confidence, 2.0])
    # A gate lets pass what is above its threshold.
    assert merit(np.nextafter(threshold, 2)) == pytest.approx(best) or merit(threshold) == pytest.approx(best)


# -- synthetic observations ------------------------------------------------------------------------------------------


def one_level(x: np.ndarray, accepted: np.ndarray, source: int = DRAFT, depth: int = 1) -> Observed:
    """Return a candidate per tree, as likely as ``x``."""
    n = len(x)
    full = [np.full(n, source), np.full(n, depth), np.log(x), np.full(n, -1), accepted, np.arange(n)]
    return Observed(*full)


def joined(*parts: Observed) -> Observed:
    return Observed(*(np.concatenate([getattr(p, name) for p in parts]) for name in Observed.__dataclass_fields__))


TRUTHS = {(DRAFT, 1): lambda x: x**0.5, (DRAFT, 2): lambda x: 0.6 * x, (BOTH, 1): lambda x: 0.3 + 0.6 * x}


def test_tables_find_the_probabilities_that_made_the_data():
    rng = np.random.default_rng(0)
    parts = []
    for (source, depth), truth in TRUTHS.items():
        x = rng.uniform(0, 1, 20_000) ** 2
        parts.append(one_level(np.maximum(x, 1e-9), rng.random(len(x)) < truth(x), source, depth))
    table = acceptance_table(joined(*parts), 2)
    assert table.shape == (3, 2, KNOTS)
    assert (np.diff(table, axis=2) >= -1e-12).all()
    for (source, depth), truth in TRUTHS.items():
        inner = slice(4, -2)
        assert table[source, depth - 1][inner] == pytest.approx(truth(knots()[inner]), abs=0.06)
    # Where there is nothing else, the head's own.
    assert table[LOOKUP, 0] == pytest.approx(table[DRAFT, 0], abs=1e-9)
    assert table[BOTH, 1] == pytest.approx(table[DRAFT, 1], abs=1e-9)


def test_children_are_quantiles_of_what_a_node_passes_on():
    rng = np.random.default_rng(1)
    first = rng.uniform(0.1, 0.9, 4000)
    own = Acceptance.uncalibrated(2).table  # worth is 0.999 of what the draft says
    best = one_level(first, np.zeros(4000, bool))
    second = one_level(first / 3, np.zeros(4000, bool))
    copied = one_level(np.full(4000, 0.95), np.zeros(4000, bool), LOOKUP)  # no child of the head's
    # Under the better half of the best ones 0.8 goes on, under the others 0.2; the better weigh more.
    below = one_level(np.where(first > 0.5, 0.8, 0.2) * first, np.zeros(4000, bool), depth=2)
    below = Observed(below.source, below.depth, below.score, np.arange(4000), below.accepted, below.tree)
    got = children_quantiles(joined(best, second, copied, below), own, 2, 1)
    assert got.shape[0] == 2
    assert got.shape[2] == len(QUANTILES)
    assert got[0, 0] == pytest.approx(0.1 + 0.8 * QUANTILES, abs=0.03)
    assert got[0, 1] == pytest.approx((0.1 + 0.8 * QUANTILES) / 3, abs=0.03)
    share = first[first <= 0.5].sum() / first.sum()
    assert 0.2 < share < 0.35
    assert got[1, 0][[0, 2, 3, 4]] == pytest.approx([0.2, 0.8, 0.8, 0.8], abs=0.02)
    assert (got[1, 1] == 0).all()


def test_gates_stand_where_confidence_tells_and_apart():
    """Depth 4 tells all and depth 3 nearly all, depth 2 nothing; the root's gate is there in any case."""
    rng = np.random.default_rng(2)
    parts = []
    for depth, noise in ((1, 0.6), (2, 100.0), (3, 0.15), (4, 0.0)):
        x = rng.uniform(0.01, 0.99, 1500)
        parts.append(one_level(x, x + noise * rng.normal(size=1500) > 0.5, DRAFT, depth))
    gates, fixed = fit_gates(joined(*parts), 4)
    assert [gate.depth for gate in gates] == [1, 2, 3, 4]
    assert [gate.depth for gate in gates if gate.sweet_spot] == [1, 4]  # 3 is beside 4, and 2 beside both
    assert gates[3].auc == 1
    assert abs(gates[1].auc - 0.5) < 0.05
    assert gates[3].threshold == pytest.approx(0.5, abs=0.01)
    assert gates[3].samples == 1500
    assert 0.35 < fixed < 0.65


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_lookup_is_the_share_of_right_copies_and_only_rises_with_the_match(cases):
    """cases: tokens matched, whether the copy is right, whether the answer goes on."""
    answers = [[1, 2] if goes_on else [1] for _, _, goes_on in cases]
    copied = [[2 if right else 3] if m >= 1 else [] for m, right, _ in cases]
    trees = recording(answers, [(i, 1) for i in range(len(cases))], copied=copied, matched=[m for m, _, _ in cases])
    got = lookup_acceptance(trees)
    shares = []
    for m in range(1, 5):
        seen = [right for matched, right, goes_on in cases if min(matched, 4) == m and goes_on]
        shares.append((sum(seen) + PRIOR * 0.2 * m) / (len(seen) + PRIOR))
    assert got == pytest.approx([min(max(max(shares[: m + 1]), 0.01), 0.99) for m in range(4)], abs=1e-4)


# -- recorded trees --------------------------------------------------------------------------------------------------


def test_without_copies_what_is_observed_are_the_recorded_trees_and_their_fate(recorded):
    got = observe(recorded, None, 3, 3, 3)
    rows = list(zip(got.tree.tolist(), got.depth.tolist(), np.round(got.score, 4).tolist(), got.accepted, strict=True))
    wanted = []
    for position in range(len(recorded)):
        rest = answer_of(recorded, recorded.request[position])[recorded.index[position] :]
        children = paths_at(recorded, position)
        for path in children:
            if 0 < len(path) <= len(rest):
                score = sum(next(q for q, token in children[path[:n]] if token == path[n]) for n in range(len(path)))
                wanted.append((position, len(path), score, list(path) == rest[: len(path)]))
    assert [row[:2] for row in sorted(rows)] == [row[:2] for row in sorted(wanted)]
    for position in range(len(recorded)):
        mine = sorted((r[1], r[2], bool(r[3])) for r in rows if r[0] == position)
        theirs = sorted((r[1], r[2], r[3]) for r in wanted if r[0] == position)
        assert [m[2] for m in mine].count(True) == [t[2] for t in theirs].count(True)
        assert [m[1] for m in mine] == pytest.approx([t[1] for t in theirs], abs=1e-3)
    assert 0 < got.accepted.sum() < len(got.accepted)
    inner = got.parent >= 0
    assert (got.depth[inner] == got.depth[got.parent[inner]] + 1).all()
    assert (got.tree[inner] == got.tree[got.parent[inner]]).all()
    assert (got.depth[~inner] == 1).all()
    assert (got.accepted[inner] <= got.accepted[got.parent[inner]]).all()


def test_a_calibration_of_recorded_trees_is_whole(recorded):
    calibration = fit(recorded, "t" * 64, "d" * 64, 3, 3, 3)
    assert calibration.positions == len(recorded)
    assert len(calibration.gates) == 3
    assert 1 in calibration.sparse_gates
    model = calibration.model()
    assert model.table.shape == (3, 3, KNOTS)
    assert len(model.children) == 3
    assert model.children[0, 0].mean() > 0
    assert len(calibration.lookup) == 4
    again = type(calibration).model_validate_json(calibration.model_dump_json())
    assert again == calibration
