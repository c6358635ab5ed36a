"""Policies by name: which planner each one is, and with which numbers."""

import re
from pathlib import Path

import pytest
from machines import Server, linear

from echo_trt.errors import UserError
from echo_trt.speculation import policies
from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import PlainPlanner
from echo_trt.speculation.policies import BUILT_IN, POLICIES, echo_settings, load_policies, make_planner

SETTINGS = {
    "budget": 2,
    "per_request": 9,
    "max_depth": 5,
    "beams": 2,
    "width": 3,
    "gates": {1: 0.3, 3: 0.2},
    "static": {"depth": 3, "top_k": 3, "tokens": 8},
}


def made(name: str):
    """Return a policy's planner; in a goodput planner's place, its name and settings."""
    return make_planner(name, SETTINGS, lambda *given: given)


def test_an_unknown_policy_is_named():
    with pytest.raises(UserError, match="policy is 'eco'; choose one of autoregressive, static"):
        made("eco")


def test_a_policy_of_ones_own_gets_the_budget(registry):
    given = []

    @registry.policy("mine", "a policy")
    def mine(name, settings, make_goodput):
        given.append(settings["budget"])
        return EchoPlanner(name, echo_settings(name, settings))

    assert registry.make_planner("mine", SETTINGS, None).budget == SETTINGS["budget"] == given[0]
    assert registry.policy_named("mine").shares_budget
    assert not registry.policy_named("static").shares_budget


class NoBudget(PlainPlanner):
    budget = None


class Raises(PlainPlanner):
    def totals(self):
        raise OSError("totals")


def fails(settings):
    raise OSError("shape")


@pytest.mark.parametrize(
    ("shape", "make", "reason"),
    [
        (None, lambda *given: given[1]["no such"], "no such"),
        (None, lambda *given: None, "name"),
        (None, lambda *given: NoBudget(), "budget is None"),
        (None, lambda *given: Raises(), "totals"),
        (fails, lambda *given: PlainPlanner(), "shape"),
    ],
)
def test_a_policy_that_fails_is_named_with_its_file(shape, make, reason, registry):
    registry.policy("mine", "a policy", shape)(make)
    with pytest.raises(UserError, match=rf"policy is mine, which fails .*{reason}.*; fix .*test_policies\.py\."):
        registry.make_planner("mine", SETTINGS, None)


@pytest.fixture
def registry(monkeypatch):
    """Let a test register policies that others do not see."""
    monkeypatch.setattr(policies, "POLICIES", dict(POLICIES))
    monkeypatch.setattr(policies, "_LOADED", set())
    return policies


CHAIN = """
from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.policies import policy

SHAPE = EchoSettings(max_depth={depth}, beams=1, width=1, per_request={depth} + 1)

@policy("{name}", "a chain", lambda settings: SHAPE)
def chain(name, settings, make_goodput):
    return EchoPlanner(name, SHAPE)
"""


def test_a_file_registers_a_policy_once(registry, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CHAIN.format(name="mine", depth=3))
    load_policies(file)
    load_policies(tmp_path / ".." / tmp_path.name / "mine.py")
    assert registry.make_planner("mine", SETTINGS, None).name == "mine"
    assert registry.reserve_for(SETTINGS) == policies.reserve_for(SETTINGS)  # bundles were built without it


TUNED = """
from dataclasses import replace
from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.policies import goodput_settings, policy, policy_named

@policy("calm", "goodput with short trials", policy_named("goodput").shape)
def calm(name, settings, make_goodput):
    tuning = GoodputTuning(trial_iterations=3, window_iterations=5, warm_up=0)
    return make_goodput(name, replace(goodput_settings(name, settings), tuning=tuning))
"""


def test_a_file_sets_tuned_values(registry, tmp_path):
    """Where no draft pays, trials of one interrupt plain decoding for as many iterations as the file says."""
    (tmp_path / "calm.py").write_text(TUNED)
    load_policies(tmp_path / "calm.py")
    target, draft, count = linear(0.01, 1.0), linear(1e-6, 0.0), 4

    def goodput(name: str, settings: GoodputSettings) -> GoodputPlanner:
        costs = Costs(target, draft, change=1e-3)
        return GoodputPlanner(name, settings, costs, Acceptance.uncalibrated(settings.max_depth), count)

    planner = registry.make_planner("calm", SETTINGS, goodput)
    server = Server(planner, linear(0.01, 1.0), linear(1e-6, 0.0), [0.2, 0.1], count).run(9)
    assert [size > count for size in server.sizes] == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is no Python file"),
        ("x = 1", "registers no policy"),
        ("raise ValueError('of mine')", r"fails \(ValueError: of mine\)"),
        (CHAIN.format(name="echo", depth=3), "'echo', which another policy has"),
        (CHAIN.format(name="My Chain", depth=3), "give lower-case letters"),
    ],
)
def test_a_file_that_is_no_policy_is_a_sentence(text, sentence, registry, tmp_path):
    file = tmp_path / "mine.py"
    if text:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_policies(file)


def test_a_policy_whose_trees_a_bundle_has_no_rows_for_is_refused(registry, tmp_path):
    file = tmp_path / "deep.py"
    file.write_text(CHAIN.format(name="deep", depth=40))
    load_policies(file)
    with pytest.raises(UserError, match=r"policy deep needs 41 KV rows per request .* bundles keep 9"):
        registry.make_planner("deep", SETTINGS, None)


def test_the_docs_list_the_policies():
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]+)", page, re.MULTILINE)
    said = {name: text for name, text in rows if name in POLICIES}
    assert said.keys() >= set(BUILT_IN)
    for name in BUILT_IN:
        assert re.split(r" \(\[|; for a", said[name].strip())[0] == POLICIES[name].summary
