"""The calibration on disk: it belongs to its pair, costs to their machine, and a broken file is named."""

import json
from datetime import date

import numpy as np
import pytest
from refusal import refused

from echo_trt.bundle import read_manifest
from echo_trt.calibration.store import (
    CALIBRATION,
    COSTS,
    Calibration,
    CostTable,
    CurveTable,
    Gate,
    machine,
    read_calibration,
    read_costs,
    write,
)
from echo_trt.decoding.acceptance import KNOTS, SOURCES, knots

TARGET, DRAFT = "1" * 64, "2" * 64


def calibration(**changes) -> Calibration:
    gate = {"auc": 0.8, "samples": 9, "accepted": 0.5}
    told = {
        "target_sha256": TARGET,
        "draft_sha256": DRAFT,
        "positions": 9,
        "gates": [Gate(depth=d, threshold=d / 10, sweet_spot=d != 2, **gate) for d in (1, 2, 3)],
        "fixed_threshold": 0.3,
        "acceptance": {source: [knots().tolist()] * 3 for source in SOURCES},
        "children": [[[0.1, 0.5], [0.0, 0.1]]] * 3,
        "lookup": [0.2, 0.4],
    }
    return Calibration(**told | changes)


def costs(on: str) -> CostTable:
    curve = CurveTable(sizes=[1, 4], seconds=[0.01, 0.02], per_context=1e-6)
    return CostTable(machine=on, measured=date(2026, 1, 2), target=curve, draft=curve, hinge={"k_max": 2.0})


@pytest.fixture
def manifest(bundle_of):
    return read_manifest(bundle_of("lookup"))


def test_what_is_written_is_read_again(tmp_path, manifest):
    write(tmp_path, CALIBRATION, calibration())
    stored = read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)
    assert stored == calibration()
    assert stored.sweet_spots == {1: 0.1, 3: 0.3}
    assert stored.model().table.shape == (len(SOURCES), 3, KNOTS)
    assert stored.model().children.shape == (3, 2, 2)
    write(tmp_path, COSTS, costs(machine(manifest)))
    table = read_costs(tmp_path, manifest)
    assert table == costs(machine(manifest))
    assert table.costs().target(2, 1000) == pytest.approx(0.01 + 0.01 / 3 + 1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CALIBRATION, COSTS]  # nothing half-written


@pytest.mark.parametrize(
    ("target", "draft", "words"),
    [("3" * 64, DRAFT, ["another target", "1" * 12, "3" * 12]), (TARGET, "", ["another draft", "2" * 12, "none"])],
)
def test_a_calibration_of_another_pair_is_refused(target, draft, words, tmp_path):
    write(tmp_path, CALIBRATION, calibration())
    with refused(tmp_path / CALIBRATION, "echo-trt calibrate", *words):
        read_calibration(tmp_path / CALIBRATION, target, draft)


def test_costs_of_another_machine_are_not_used(tmp_path, manifest):
    assert read_costs(tmp_path, manifest) is None
    write(tmp_path, COSTS, costs("a faster one"))
    assert read_costs(tmp_path, manifest) is None
    assert machine(manifest) == machine(manifest)
    assert manifest.computes_in in machine(manifest)


BROKEN = [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"format": 1}', b"null"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_named(content, tmp_path, manifest):
    for name in (CALIBRATION, COSTS):
        (tmp_path / name).write_bytes(content)
    with refused(tmp_path / CALIBRATION, "run echo-trt calibrate again"):
        read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)
    with refused(tmp_path / COSTS, "delete it"):
        read_costs(tmp_path, manifest)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / CALIBRATION).mkdir()
    with refused(tmp_path / CALIBRATION, "cannot be read"):
        read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)


@pytest.mark.parametrize(
    "changes",
    [
        {"acceptance": {"head": [knots().tolist()]}},
        {"acceptance": {source: [[0.1, 0.2]] for source in SOURCES}},
        {"acceptance": {source: [knots().tolist()] * (1 + (source == "head")) for source in SOURCES}},
        {"children": [[0.1, 0.2]]},
        {"children": []},
        {"lookup": []},
    ],
    ids=["a-source-lacks", "few-knots", "ragged-depths", "flat-children", "no-children", "no-lookup"],
)
def test_a_calibration_with_holes_is_refused(changes, tmp_path):
    whole = json.loads(calibration().model_dump_json())
    (tmp_path / CALIBRATION).write_text(json.dumps(whole | changes))
    with refused(tmp_path / CALIBRATION, "calibrate again"):
        read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)


@pytest.mark.parametrize(
    "curve",
    [
        {"sizes": [], "seconds": []},
        {"sizes": [1, 2], "seconds": [0.1]},
        {"sizes": [4, 2], "seconds": [0.1, 0.2]},
        {"sizes": [0, 2], "seconds": [0.1, 0.2]},
        {"sizes": [1, 2], "seconds": [0.1, -0.2]},
    ],
    ids=["empty", "ragged", "descending", "from-zero", "negative"],
)
def test_costs_that_cannot_be_are_refused(curve, tmp_path, manifest):
    raw = json.loads(costs(machine(manifest)).model_dump_json())
    (tmp_path / COSTS).write_text(json.dumps(raw | {"target": curve}))
    with refused(tmp_path / COSTS, "delete it"):
        read_costs(tmp_path, manifest)


def test_numbers_survive_the_file(tmp_path):
    write(tmp_path, CALIBRATION, calibration(acceptance={s: [np.linspace(0, 1, KNOTS).tolist()] * 3 for s in SOURCES}))
    stored = read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT).model()
    assert stored.table[1, 0] == pytest.approx(np.linspace(0, 1, KNOTS), abs=1e-12)
