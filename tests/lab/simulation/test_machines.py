import json

import pytest
import yaml
from refusal import refused

from echo_trt_lab.simulation.machines import (
    NAMES,
    ROOFLINES,
    from_costs_file,
    from_machine_file,
    machine_named,
)

COSTS = {
    "machine": "a test's",
    "measured": "2026-11-24",
    "target": {"sizes": [1, 4, 16], "seconds": [0.01, 0.011, 0.02], "per_context": 1e-6},
    "draft": {"sizes": [1, 16], "seconds": [0.001, 0.002]},
    "hinge": {"t_ar": 0.01, "gamma": 0.1, "k_max": 4, "error": 0.1},
}


def test_one_token_of_an_8b_model_takes_its_weights_over_the_bandwidth():
    costs = machine_named("h100-qwen3-8b", None).costs()
    weights = 2 * (8.2e9 - 151_936 * 4096) / (0.88 * 3.35e12)
    assert costs.target(1) == pytest.approx(0.3e-3 + weights, rel=1e-3)
    assert costs.target(1, 1000) - costs.target(1) == pytest.approx(1000 * 147_456 / (0.88 * 3.35e12))
    # Far above the knee only arithmetic counts.
    assert costs.target(8192) - costs.target(4096) == pytest.approx(
        4096 * 2 * (8.2e9 - 151_936 * 4096) / (0.6 * 989e12), rel=0.02
    )


@pytest.mark.parametrize(
    ("name", "whole", "active"),
    [("8xh100-qwen3-235b", 235e9, 22e9), ("4xl40s-llama-70b", 70.6e9, 70.6e9), ("4090-llama-8b", 8.03e9, 8.03e9)],
)
def test_a_file_has_the_models_parameters(name, whole, active):
    model = yaml.safe_load(ROOFLINES[name].read_text())["target"]
    experts, chosen, expert = (model.get(key, 0) for key in ("experts", "experts_per_token", "expert"))
    assert model["embedding"] + model["dense"] + experts * expert == pytest.approx(whole, rel=0.01)
    assert model["embedding"] + model["dense"] + chosen * expert == pytest.approx(active, rel=0.02)


def test_a_machine_of_ones_own(tmp_path):
    """A file beside ours, with half the bandwidth: one token takes twice as long, and knee and memory follow."""
    text = ROOFLINES["h100-qwen3-8b"].read_text()
    (tmp_path / "slow.yaml").write_text(text.replace("3.35e12", "1.675e12"))
    slow, ours = from_machine_file(tmp_path / "slow.yaml"), machine_named("h100-qwen3-8b", None)
    assert slow.name == "slow"
    assert machine_named(str(tmp_path / "slow.yaml"), None).k_max == slow.k_max > ours.k_max
    assert slow.costs().target(1) - 0.3e-3 == pytest.approx(2 * (ours.costs().target(1) - 0.3e-3), rel=1e-3)
    for wrong, words in (("cards: 0\n", "cards"), ("speed: 3\n", "speed"), ("{", "no YAML")):
        (tmp_path / "bad.yaml").write_text(text + wrong)
        with refused("bad.yaml", words, "simulation/cards"):
            from_machine_file(tmp_path / "bad.yaml")
    with refused("none.yaml", "cannot be read"):
        machine_named(str(tmp_path / "none.yaml"), None)


def test_this_machine_is_as_measured(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(COSTS))
    machine = from_costs_file(path)
    assert machine.name == "a test's"
    assert machine.costs().target(4, 1000) == pytest.approx(0.012)
    assert machine.costs().draft(16) == pytest.approx(0.002)
    assert machine.k_max == 4  # as the runtime has it, which goes by the stored hinge
    path.write_text(json.dumps(COSTS | {"cold": 3e-4, "sizes": [8, 16], "change": 2e-3}))
    costs = from_costs_file(path).costs()
    assert (costs.cold, costs.sizes, costs.change) == (3e-4, (8, 16), 2e-3)
    assert from_costs_file(path).k_max == 8


def test_bad_machines(tmp_path):
    with refused("--machine", "'a100'", *NAMES):
        machine_named("a100", None)
    with refused("--costs", "this"):
        machine_named("this", None)
    with refused("--costs", "h100-qwen3-8b"):
        machine_named("h100-qwen3-8b", tmp_path)
    with refused("costs.json", "cannot be read"):
        machine_named("this", tmp_path / "costs.json")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(COSTS | {"target": {"sizes": "many", "seconds": []}}))
    with refused(bad, "target.sizes"):
        machine_named("this", bad)
    bad.write_text(json.dumps(COSTS | {"hinge": {}}))
    with refused(bad, "hinge.t_ar", "name a costs.json"):
        machine_named("this", bad)
