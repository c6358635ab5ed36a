"""The file of ablations, loaded as a user loads a file of policies."""

import pytest
from batches import repeated
from driving import assert_all_free, goodput_planner, machine

from echo_trt.speculation.policies import load_policies, make_planner
from echo_trt_lab.device_counts import ABLATIONS

SETTINGS = {
    "budget": 40, "per_request": 64, "max_depth": 6, "beams": 2, "width": 4, "gates": {2: 0.5, 4: 0.3},
    "static": {"depth": 3, "top_k": 2, "tokens": 5},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    load_policies(ABLATIONS)


@pytest.mark.parametrize(
    ("policy", "stated", "gates"),
    [
        ("dense", {2: 0.5, 4: 0.3}, {1: 0.5, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.3, 6: 0.3}),
        ("dense", {}, {}),
        ("fixed", {2: 0.5, 4: 0.3}, {2: 0.5, 4: 0.5}),
        ("fixed", {}, {}),
    ],
)
def test_gates_by_the_recipe(policy, stated, gates):
    planner = make_planner(policy, SETTINGS | {"gates": stated, "calibration": None}, None)
    assert planner.settings.gates == pytest.approx(gates)
    assert (planner.name, planner.budget) == (policy, 40)


@pytest.mark.parametrize("policy", ["dense", "fixed", "goodput-head"])
@pytest.mark.parametrize("pair", ["close", "lookup"])
def test_they_change_no_token_and_the_head_alone_copies_none(pair, policy, open_llm):
    llm = open_llm(pair, "autoregressive", 3)
    wanted = [completion.token_ids for completion in llm.generate(*repeated())]
    settings = llm.manifest.recipe.decoding.model_dump()
    llm.loop.planner = make_planner(policy, settings, lambda name, _: goodput_planner(llm, machine()))
    assert [completion.token_ids for completion in llm.generate(*repeated())] == wanted
    assert (llm.counters.drafted_tokens > 0) == (policy != "goodput-head" or pair != "lookup")
    assert_all_free(llm.loop)
