"""The calibration on disk: it belongs to its pair, costs to their machine, and a broken file is named."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from refusal import refused

from echo_trt.bundle.calibration import Calibration, Gate, read_calibration
from echo_trt.bundle.costs import COSTS, CostTable, CurveTable, HingeTable, read_costs
from echo_trt.bundle.manifest import Manifest, read_manifest
from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt.engine.llm import LLM
from echo_trt.engine.measure import machine
from echo_trt.errors import UserError
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED, KNOTS, knots
from echo_trt.supervision.options import ServeOptions

TARGET, DRAFT = "1" * 64, "2" * 64


def calibration(**changes) -> Calibration:
    gate = {"auc": 0.8, "samples": 9, "accepted": 0.5}
    reported = {
        "target_sha256": TARGET,
        "draft_sha256": DRAFT,
        "positions": 9,
        "gates": [Gate(depth=d, threshold=d / 10, sweet_spot=d != 2, **gate) for d in (1, 2, 3)],
        "fixed_threshold": 0.3,
        "acceptance": {source: [knots().tolist()] * 3 for source in CALIBRATED},
        "children": [[[0.1, 0.5], [0.0, 0.1]]] * 3,
        "lookup": [0.2, 0.4],
    }
    return Calibration(**reported | changes)


def costs(on: str) -> CostTable:
    curve = CurveTable(sizes=[1, 4], seconds=[0.01, 0.02], per_context=1e-6)
    hinge = HingeTable(t_ar=0.01, gamma=0.3, k_max=2, error=0.1)
    return CostTable(machine=on, measured=date(2026, 1, 2), target=curve, draft=curve, hinge=hinge)


def edited(table: dict, path: str, value: object) -> dict:
    """``table`` with another value at such a path as target.seconds.0."""
    *above, last = (int(key) if key.isdigit() else key for key in path.split("."))
    index = table
    for key in above:
        index = index[key]
    index[last] = value
    return table


@pytest.fixture
def manifest(bundle_of):
    return read_manifest(bundle_of("lookup"))


def test_what_is_written_is_read_again(tmp_path, manifest):
    write(tmp_path, CALIBRATION, calibration())
    stored = read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)
    assert stored == calibration()
    assert stored.sparse_gates == {1: 0.1, 3: 0.3}
    assert stored.model().table.shape == (len(CALIBRATED), 3, KNOTS)
    assert stored.model().children.shape == (3, 2, 2)
    write(tmp_path, COSTS, costs(machine(manifest)))
    table = read_costs(tmp_path / COSTS, manifest, machine(manifest), pytest.fail)
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


def test_costs_of_another_card_are_not_used(tmp_path, manifest, monkeypatch):
    """A table of a faster card would not be doubted: a pass that takes longer now may be due to other work."""
    on_gpus = manifest.model_copy(update={"engine": "torch"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    write(tmp_path, COSTS, costs(machine(on_gpus)))
    assert read_costs(tmp_path / COSTS, on_gpus, machine(on_gpus), pytest.fail)
    assert "H100" not in machine(manifest)  # OpenVINO's computes on the CPU
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L40S")
    assert read_costs(tmp_path / COSTS, on_gpus, machine(on_gpus), pytest.fail) is None


BROKEN = [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"format": 1}', b"null"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_named(content, tmp_path, manifest):
    for name in (CALIBRATION, COSTS):
        (tmp_path / name).write_bytes(content)
    with refused(tmp_path / CALIBRATION, "run echo-trt calibrate again"):
        read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)
    assert_measured_again(tmp_path, manifest)


def assert_measured_again(folder: Path, manifest: Manifest, *words: str) -> None:
    reported = []
    assert read_costs(folder / COSTS, manifest, machine(manifest), reported.append) is None
    assert len(reported) == 1
    with refused(folder / COSTS, "it is measured again", *words):
        raise UserError(reported[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"acceptance": {"head": [knots().tolist()]}},
        {"acceptance": {source: [[0.1, 0.2]] for source in CALIBRATED}},
        {"acceptance": {source: [knots().tolist()] * (1 + (source == "head")) for source in CALIBRATED}},
        {"children": [[0.1, 0.2]]},
        {"format": 9},
    ],
    ids=["a-source-lacks", "few-knots", "ragged-depths", "flat-children", "format"],
)
def test_a_calibration_with_holes_is_refused(changes, tmp_path):
    whole = json.loads(calibration().model_dump_json())
    (tmp_path / CALIBRATION).write_text(json.dumps(whole | changes))
    with refused(tmp_path / CALIBRATION, "calibrate again"):
        read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lookup.0", 2.0),
        ("acceptance.head.0.3", 7.0),
        ("fixed_threshold", -1.0),
    ],
)
def test_a_calibration_of_no_probabilities_is_refused(path, value, tmp_path):
    raw = edited(json.loads(calibration().model_dump_json()), path, value)
    (tmp_path / CALIBRATION).write_text(json.dumps(raw))
    with refused(tmp_path / CALIBRATION, f"{path} is not valid", f"not {value!r}", "calibrate again"):
        read_calibration(tmp_path / CALIBRATION, TARGET, DRAFT)


@pytest.mark.parametrize(
    "curve",
    [
        {"sizes": [], "seconds": []},
        {"sizes": [4, 2], "seconds": [0.1, 0.2]},
        {"sizes": [1, 2], "seconds": [0.2, 0.1]},
        {"sizes": [1, 2], "seconds": [0.0, 0.1]},
    ],
    ids=["empty", "descending", "faster", "nothing-first"],
)
def test_costs_that_cannot_be_are_measured_again(curve, tmp_path, manifest):
    raw = json.loads(costs(machine(manifest)).model_dump_json())
    (tmp_path / COSTS).write_text(json.dumps(raw | {"target": curve}))
    assert_measured_again(tmp_path, manifest)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("target.seconds.0", float("nan"), "target.seconds.0 is not valid"),
        ("draft.seconds.1", 1e308, "not 1e+308"),
        ("target.sizes.1", 10**9, "not 1000000000"),
        ("hinge.k_max", -5, "not -5"),
        ("hinge.k_max", 5, "hinge.k_max is 5"),
        ("sizes", [4, 2], "sizes must ascend"),
        ("format", 7, "not 7"),
    ],
)
def test_a_damaged_number_of_the_costs_is_named(path, value, words, tmp_path, manifest):
    raw = edited(json.loads(costs(machine(manifest)).model_dump_json()), path, value)
    (tmp_path / COSTS).write_text(json.dumps(raw))
    assert_measured_again(tmp_path, manifest, words)


def test_costs_without_the_draft_of_a_bundle_that_has_one_are_not_used(tmp_path, bundle_of):
    manifest = read_manifest(bundle_of("model"))
    none = CurveTable(sizes=[1], seconds=[0.0])
    write(tmp_path, COSTS, costs(machine(manifest)).model_copy(update={"draft": none}))
    assert read_costs(tmp_path / COSTS, manifest, machine(manifest), pytest.fail) is None


def test_costs_are_kept_in_a_file_of_their_own_and_taken_on_such_a_machine_alone(tmp_path, bundle_of):
    bundle, reported = Path(shutil.copytree(bundle_of("lookup"), tmp_path / "bundle")), []
    (bundle / COSTS).unlink(missing_ok=True)
    folder = tmp_path / "costs"
    folder.mkdir()

    def measured(costs: Path) -> bool:
        reported.clear()
        LLM(bundle, "goodput", note=reported.append, costs=costs)
        return any("measuring what passes cost" in note for note in reported)

    assert measured(folder)
    assert not (bundle / COSTS).exists()
    assert not measured(folder / COSTS)
    (bundle / COSTS).write_text((folder / COSTS).read_text())
    assert not measured(tmp_path / "none.json")  # the bundle's own are read besides
    (bundle / COSTS).unlink()
    table = json.loads((folder / COSTS).read_text())
    (folder / COSTS).write_text(json.dumps(table | {"machine": "another"}))
    assert measured(folder)


def test_costs_that_a_read_only_bundle_cannot_keep_are_the_server_s(tmp_path, monkeypatch):
    job = ServeOptions(tmp_path)
    assert job.keeping_costs(tmp_path / "work") is job
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    kept = job.keeping_costs(tmp_path / "work")
    assert f"--costs={tmp_path.resolve()}/work/costs.json" in kept.words
    own = ServeOptions(tmp_path, costs=tmp_path / "own.json")
    assert own.keeping_costs(tmp_path / "work") is own


def test_a_start_makes_damaged_costs_anew(tmp_path, bundle_of):
    bundle = Path(shutil.copytree(bundle_of("lookup"), tmp_path / "bundle"))
    (bundle / COSTS).write_text('{"format": 7}')
    reported = []
    LLM(bundle, "goodput", note=reported.append)
    assert any("format is not valid" in note for note in reported)
    assert read_costs(bundle / COSTS, read_manifest(bundle), machine(read_manifest(bundle)), pytest.fail) is not None
