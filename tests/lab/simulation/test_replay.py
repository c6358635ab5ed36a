from dataclasses import replace

import numpy as np
import pytest
from ngram_tables import table
from synthetic import recorded

from echo_trt.engine.drafters.levels import device_work
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.pack import LevelShape
from echo_trt.speculation.policies import goodput_settings
from echo_trt.speculation.policy_names import PLAIN
from echo_trt_lab.calibration.fit import fit
from echo_trt_lab.simulation import replay as replay_module
from echo_trt_lab.simulation.command import planner_for
from echo_trt_lab.simulation.machines import DeviceCosts, Machine, machine_named
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


def test_context_is_paid_for(recording, calibration):
    slow = machine(KNEE.target[1], KNEE.draft[1], per_context=1e-5)
    run = replay(recording, calibration, PLAIN, 3, slow)
    context = run.walk.context.sum()
    assert run.step().seconds == pytest.approx(slow.costs().target(3) + 1e-5 * context)


@pytest.mark.parametrize("policy", ["goodput", "static"])
def test_a_draft_that_is_always_right_and_free_gives_all_its_levels_and_the_bonus(calibration, policy):
    always = Recording(recorded([60, 45, 80], 4, 2, 3, right=1.0))
    sure = fit(always.trees, "target", "draft", 4, 2, 3)
    run = replay(always, sure, policy, 3, FREE, static={"depth": 4, "top_k": 1, "tokens": 5})
    for _ in range(8):  # the next ones try plain decoding
        left = run.walk.left
        assert (run.step().tokens == np.minimum(5, left)).all()


def test_a_draft_that_is_never_right_is_given_up(recording):
    never = Recording(recorded([60, 45, 80, 70] * 3, 4, 2, 3, right=0.0, copied=0.0))
    hopeless = fit(never.trees, "target", "draft", 4, 2, 3)
    tally = replay(never, hopeless, "goodput", 4).run(400)
    assert tally.figures()["accepted_length"] == 1
    assert tally.rate > 0.98 * replay(never, hopeless, PLAIN, 4).run(400).rate


@pytest.mark.parametrize("on", [KNEE, FREE, machine_named("8xh100-qwen3-235b", None)], ids=["knee", "free", "moe"])
@pytest.mark.parametrize("batch", [1, 4, 48])
def test_nobody_beats_the_oracle(recording, calibration, on, batch):
    best = Oracle(recording, on, CANDIDATES, batch, 10).run(1200)
    assert best.figures()["draft_utilisation"] in (None, 1)
    for policy in POLICIES:
        assert replay(recording, calibration, policy, batch, on).run(1200).rate <= best.rate * 1.001


def test_n_grams_bring_something(recording, calibration, ngrams):
    with_them, without = (replay(recording, calibration, "goodput", 4, ngrams=n).run(1200) for n in (ngrams, None))
    assert with_them.rate > 1.02 * without.rate


@pytest.mark.parametrize("batch", [1, 4, 48])
def test_the_oracle_has_n_grams_too(recording, calibration, ngrams, batch):
    best = Oracle(recording, KNEE, CANDIDATES, batch, 10, ngrams).run(1200)
    assert best.rate >= replay(recording, calibration, "goodput", batch, ngrams=ngrams).run(1200).rate / 1.001
    assert best.rate > 1.01 * Oracle(recording, KNEE, CANDIDATES, batch, 10).run(1200).rate


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


def test_what_a_pass_costs_beside_its_tokens_is_paid_for(recording, calibration):
    """Padding, a change of size, a cold draft, planning, and nodes that attend their request's context again."""
    dear = replace(
        KNEE, target=(*KNEE.target[:3], 1e-6), cold=3e-4, padded=tuple(range(8, 65, 8)), change=2e-3, level_seconds=1e-4
    )
    run, plain = (replay(recording, calibration, "static", 3, each) for each in (dear, KNEE))
    for again in range(3):
        context = run.walk.context.copy()
        step, cheap = run.step(), plain.step()
        nodes = 3 + step.verified
        filled = KNEE.costs().target(nodes + -nodes % 8) - KNEE.costs().target(nodes)
        attended = 1e-6 * step.verified / 3 * context.sum()  # a static tree is full: as many nodes for each request
        more = filled + attended + 3e-4 + 1e-4 * step.levels + 2e-3 * (again == 0)
        assert step.verified == 3 * 5
        assert step.seconds - cheap.seconds == pytest.approx(more, rel=1e-6)


def test_goodput_pays_for_the_nodes_that_it_considers(recording, calibration):
    """Of a large batch its search takes longer than a level's planning, also where it drafts nothing."""
    free, dear = (replace(KNEE, candidate_seconds=each) for each in (0.0, 1e-5))
    (cheap, step), (same, again) = (
        [replay(recording, calibration, policy, 3, each).step() for each in (free, dear)]
        for policy in ("goodput", "static")
    )
    assert step.verified == cheap.verified > 0
    assert step.seconds - cheap.seconds >= 1e-5 * (3 + step.verified)
    assert same.seconds == again.seconds


def test_the_clock_tells_the_policy_nothing_new(recording, calibration):
    run = replay(recording, calibration, "goodput", 8)
    run.run(500)
    assert run.planner.costs.target.seconds == pytest.approx(KNEE.target[1])
    assert run.planner.costs.draft.seconds == pytest.approx(KNEE.draft[1])
    assert run.planner.learner.history.host_seconds == pytest.approx(1e-3, rel=0.2)


def test_runs_repeat(recording, calibration):
    first, second = (replay(recording, calibration, "goodput", 7).run(500).figures() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("policy", ["echo", "static"])
def test_a_block_drafter_takes_one_pass_of_its_rows(recording, calibration, policy):
    run = replay(recording, calibration, policy, 3, block=5)
    draft_lag = run.walk.draft_lag.copy()
    step = run.step()
    host = KNEE.host_seconds
    draft = step.seconds - host - run._clock.target(step.verified + 3)
    assert step.levels == 1
    assert draft == pytest.approx(KNEE.costs().draft(int(draft_lag.sum()) + 5 * 3), rel=1e-6)


def test_one_pass_for_all_levels_is_worth_more_than_a_pass_a_level(recording, calibration):
    by_level, at_once = (replay(recording, calibration, "goodput", 8, block=block).run(2000) for block in (0, 5))
    assert at_once.rate > 1.02 * by_level.rate
    ideal = [Oracle(recording, KNEE, CANDIDATES, 8, 10, block=block).run(2000).rate for block in (0, 5)]
    assert ideal[1] > ideal[0]
    assert at_once.rate <= ideal[1]


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


@pytest.mark.parametrize("batch", [1, 2, 8, 64, 256])
def test_on_a_device_echo_never_loses_to_plain_decoding(deep, batch):
    echo, plain = (on_device(deep, policy, batch).run(max(600, 8 * batch)) for policy in ("echo", PLAIN))
    assert echo.rate >= 0.999 * plain.rate


def test_a_draft_that_gates_do_not_limit_and_that_repeats_levels_loses_on_a_device(deep, monkeypatch):
    """What the device path did once: all levels before any gate is read, and with each level the levels above it."""
    plain, before = (on_device(deep, policy, 64).run(600) for policy in (PLAIN, "echo"))
    monkeypatch.setattr(EchoSettings, "reach", lambda self, depth, requests, spare: self.max_depth)
    counted = replay_module.device_work

    def repeated(requests, shape, padded, lag=0, sizes=()):
        work, rows = counted(requests, shape, padded, lag, sizes), padded(requests) * shape.beams
        levels = tuple(rows * level for level in range(shape.first, shape.first + shape.levels))
        return work._replace(tokens=work.tokens[: len(work.tokens) - shape.levels] + levels)

    monkeypatch.setattr(replay_module, "device_work", repeated)
    after = on_device(deep, "echo", 64).run(600)
    assert after.figures()["iteration_ms"] > 1.25 * before.figures()["iteration_ms"]
    assert after.rate < 0.8 * plain.rate
    assert plain.rate < before.rate


def test_a_device_runs_the_levels_between_gates_in_one_go():
    """New beams alone, of the padded requests; a graph for the missing entries, and one for all levels."""
    first = device_work(5, LevelShape(1, 2, 4, 8), lambda requests: 8, lag=9, sizes=(8, 16, 32))
    assert (first.tokens, first.launches) == ((16, 32, 32), 2)
    further = device_work(5, LevelShape(3, 2, 4, 8), lambda requests: 8)
    assert (further.tokens, further.launches) == ((32, 32), 1)
    assert device_work(5, LevelShape(1, 0, 4, 8), lambda requests: 8, lag=5).launches == 1


def test_waits_and_launches_are_paid_for(deep):
    machine = machine_named("h100-qwen3-8b", None)
    free, slow = (replace(machine, device=DeviceCosts(*seconds)) for seconds in ((0.0, 0.0), (1e-3, 2e-3)))
    fast_step, slow_step = (on_device(deep, "static", 1, on).step() for on in (free, slow))
    # A launch and a wait of the target; the roots' pass and the levels: two launches, one wait.
    assert slow_step.seconds - fast_step.seconds == pytest.approx(3e-3 + 4e-3)
