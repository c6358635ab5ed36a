import numpy as np
import pytest
from ngram_tables import table
from synthetic import recorded

from echo_trt.speculation.policies import goodput_settings
from echo_trt.speculation.policy_names import PLAIN
from echo_trt_lab.calibration.fit import fit
from echo_trt_lab.simulation.command import planner_for
from echo_trt_lab.simulation.machines import Machine, machine_named
from echo_trt_lab.simulation.oracle import Oracle
from echo_trt_lab.simulation.replay import Replay
from echo_trt_lab.simulation.walk import Recording, Walk

SIZES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
SETTINGS = {
    "max_depth": 4,
    "beams": 2,
    "width": 3,
    "per_request": 64,
    "budget": 32,
    "gates": {1: 0.2, 3: 0.1},
    "static": {"depth": 4, "top_k": 2, "tokens": 6},
}
POLICIES = ("goodput", "echo", "static", PLAIN)
CANDIDATES = goodput_settings("goodput", SETTINGS)


def machine(target, draft, host=0.0, per_context=0.0) -> Machine:
    return Machine("test", (SIZES, target, per_context, 0.0), (SIZES, draft, 0.0, 0.0), host, 0.0, ())


KNEE = machine(np.maximum(1e-2, 3e-4 * SIZES), 5e-4 + 1e-5 * SIZES, 1e-3)
FREE = machine(np.full(9, 1e-2), np.full(9, 1e-12))


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording(recorded([60, 45, 80, 64, 70, 33, 58, 90], 4, 2, 3))


@pytest.fixture(scope="module")
def calibration():
    return fit(recorded([60] * 12, 4, 2, 3, seed=9), "target", "draft", 4, 2, 3)


@pytest.fixture(scope="module")
def ngrams(recording):
    """Every second token, from the one before it; of those about four in five rightly."""
    answers = recording.trees.answers.tolist()
    right = np.random.default_rng(0).random(len(answers)) < 0.8
    pairs = list(zip(answers[::2], answers[1::2], right, strict=False))
    return table({(a,): (b if sure else b + 1, 0.8) for a, b, sure in pairs}, 1)


def replay(recording, calibration, policy, batch, on=KNEE, ngrams=None, block=0, **settings) -> Replay:
    walk = Walk(recording, batch, 10)
    return Replay(walk, on, planner_for(policy, SETTINGS | settings, calibration, on, walk, ngrams, block), block)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_plain_decoding_has_the_rate_that_arithmetic_says(recording, calibration, batch):
    tally = replay(recording, calibration, PLAIN, batch).run(500)
    assert tally.rate == pytest.approx(batch / (KNEE.costs().target(batch) + 1e-3))
    assert tally.figures()["accepted_length"] == 1
    assert tally.figures()["draft_utilisation"] is None


@pytest.mark.parametrize("policy", ["goodput", "static"])
def test_a_draft_that_is_always_right_and_free_gives_all_its_levels_and_the_bonus(calibration, policy):
    always = Recording(recorded([60, 45, 80], 4, 2, 3, right=1.0))
    sure = fit(always.trees, "target", "draft", 4, 2, 3)
    run = replay(always, sure, policy, 3, FREE, static={"depth": 4, "top_k": 1, "tokens": 5})
    for _ in range(8):  # the next ones try plain decoding
        left = run.walk.left
        assert (run.step().tokens == np.minimum(5, left)).all()


@pytest.mark.parametrize(
    ("on", "batch"), [(KNEE, 1), (FREE, 4), (machine_named("8xh100-qwen3-235b", None), 48)], ids=["knee", "free", "moe"]
)
def test_nobody_beats_the_oracle(recording, calibration, on, batch):
    best = Oracle(recording, on, CANDIDATES, batch, 10).run(1200)
    assert best.figures()["draft_utilisation"] in (None, 1)
    for policy in POLICIES:
        assert replay(recording, calibration, policy, batch, on).run(1200).rate <= best.rate * 1.001


def test_on_a_machine_with_a_knee_the_policies_are_in_order(recording, calibration):
    rate = {name: replay(recording, calibration, name, 16).run(3000).rate for name in POLICIES}
    assert rate["goodput"] > rate["autoregressive"] > rate["static"]


def test_passes_take_along_what_the_runtimes_do(recording, calibration):
    run = replay(recording, calibration, "static", 3)
    draft_costs, target_costs = KNEE.costs().draft, KNEE.costs().target
    for draft_lag in (3, None):
        draft_lag = draft_lag or int(run.walk.draft_lag.sum())
        step = run.step()
        # 2 beams of 3 requests, and at each level those above again: 6, 12, 18 entries
        passes = [draft_costs(n) for n in (draft_lag, 6, 12, 18)]
        assert step.levels == 4
        assert step.seconds == pytest.approx(sum(passes) + target_costs(3 + step.verified) + 1e-3)


@pytest.fixture(scope="module")
def deep():
    """Trees as deep as those of Qwen3-8B's recipe, and their calibration."""
    trees, others = recorded([100] * 12, 8, 4, 4, seed=3), recorded([60] * 12, 8, 4, 4, seed=9)
    return Recording(trees), fit(others, "target", "draft", 8, 4, 4)


def on_device(deep, policy, batch, on=None, prompt=1024) -> Replay:
    on = on or machine_named("h100-qwen3-8b", None)
    recording, calibration = deep
    settings = SETTINGS | {
        "max_depth": 8,
        "beams": 4,
        "width": 4,
        "budget": on.k_max,
        "gates": calibration.sparse_gates,
    }
    walk = Walk(recording, batch, prompt)
    return Replay(walk, on, planner_for(policy, settings, calibration, on, walk))


@pytest.mark.parametrize("batch", [1, 8, 256])
def test_on_a_device_echo_never_loses_to_plain_decoding(deep, batch):
    echo, plain = (on_device(deep, policy, batch).run(max(600, 8 * batch)) for policy in ("echo", PLAIN))
    assert echo.rate >= 0.999 * plain.rate
