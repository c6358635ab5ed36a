"""``echo-trt calibrate`` on a tiny pair, and what a bundle's policies make of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from refusal import refused
from rich.console import Console

from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.bundle.costs import COSTS
from echo_trt.bundle.stored import CALIBRATION
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt_lab.calibration.command import run
from echo_trt_lab.calibration.options import CalibrateOptions
from echo_trt_lab.simulation.prediction import predict


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "prompt": f"{i} abc abc abc"} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return file


@pytest.fixture
def bundle(bundle_of, tmp_path) -> Path:
    """Return a copy that a test may write into."""
    return Path(
        shutil.copytree(bundle_of("close"), tmp_path / "bundle", ignore=shutil.ignore_patterns("cal*", "costs*"))
    )


@pytest.fixture(autouse=True)
def ticks(monkeypatch) -> SimpleNamespace:
    """Every pass that is timed takes a millisecond, whatever else runs beside these tests."""
    clock = SimpleNamespace(now=0.0)

    def perf_counter() -> float:
        clock.now += 1e-3
        return clock.now

    monkeypatch.setattr("echo_trt.engine.measure.time", SimpleNamespace(perf_counter=perf_counter))
    return clock


def options(bundle: Path, prompts: Path, limit: int) -> CalibrateOptions:
    return CalibrateOptions(bundle, prompts=[prompts], limit=limit, max_tokens=24, batch=4)


def calibrate(bundle: Path, prompts: Path) -> None:
    run(options(bundle, prompts, 8), Console(quiet=True), Console(quiet=True), predict)


def test_a_calibrated_bundle_gates_as_it_says_and_notes_nothing(bundle, prompts):
    calibrate(bundle, prompts)
    html = (bundle / "calibration.html").read_text("utf-8")
    assert html.count("<svg") == html.count("<figcaption>") == 4
    assert html.index("Speedup to expect") < html.index("Where a gate is worth most")
    assert html.count("<table>") == 2
    notes: list[str] = []
    llm = LLM(bundle, "goodput", note=notes.append)
    assert notes == []
    stored = json.loads((bundle / CALIBRATION).read_text("utf-8"))
    spots = {g["depth"]: g["threshold"] for g in stored["gates"] if g["sweet_spot"]}
    assert 1 in spots
    # The tiny pair's recipe has gates of its own, which stand.
    llm.set_policy("echo")
    assert llm.loop.planner.settings.gates == {1: 0.05, 3: 0.01}


def test_without_a_calibration_that_is_said_and_costs_are_measured_once(bundle):
    notes: list[str] = []
    LLM(bundle, "goodput", note=notes.append)
    assert len(notes) == 2
    assert "calibrate" in notes[0]
    assert "measuring" in notes[1]
    LLM(bundle, "goodput", note=notes.append)
    assert len(notes) == 3  # the costs are known by now


@pytest.mark.parametrize(
    ("key", "other"), [("machine", lambda own: "another"), ("sizes", lambda own: own[1:])], ids=["machine", "padding"]
)
def test_costs_of_another_machine_or_padding_are_measured_again(key, other, bundle):
    LLM(bundle, "goodput")
    stored = json.loads((bundle / COSTS).read_text("utf-8"))
    (bundle / COSTS).write_text(json.dumps({**stored, key: other(stored[key])}), "utf-8")
    notes: list[str] = []
    LLM(bundle, "goodput", note=notes.append)
    assert any("measuring" in note for note in notes)
    assert json.loads((bundle / COSTS).read_text("utf-8"))[key] == stored[key]


@pytest.mark.parametrize(("times", "again"), [(100.0, True), (0.01, False)])
def test_costs_that_were_measured_beside_other_work_are_measured_again(times, again, bundle):
    """Now it may be that other work runs: that passes take longer than the table says puts nothing in doubt."""
    LLM(bundle, "goodput")
    stored = json.loads((bundle / COSTS).read_text("utf-8"))
    slow = {**stored["target"], "seconds": [times * seconds for seconds in stored["target"]["seconds"]]}
    (bundle / COSTS).write_text(json.dumps({**stored, "target": slow}), "utf-8")
    notes: list[str] = []
    llm = LLM(bundle, "goodput", note=notes.append)
    assert any("other work ran" in note for note in notes) == any("measuring" in note for note in notes) == again
    kept = json.loads((bundle / COSTS).read_text("utf-8"))["target"]["seconds"]
    assert (kept == slow["seconds"]) == (not again)
    assert llm.loop.batch.blocks.free == llm.loop.batch.blocks.count


@pytest.fixture
def disturbed(ticks, monkeypatch) -> None:
    """Other work takes half a second of each pass over two tokens or more."""
    run = OpenVINOEngine.run

    def slower(engine, call, **inputs):
        ticks.now += 0.5 * (len(call.token_ids) > 1)
        return run(engine, call, **inputs)

    monkeypatch.setattr(OpenVINOEngine, "run", slower)


def test_costs_that_other_work_disturbs_are_neither_gone_by_nor_kept(bundle, disturbed):
    notes: list[str] = []
    llm = LLM(bundle, "goodput", note=notes.append)
    assert notes[-1] == (
        "other work disturbed that (a pass over 2 tokens took 501 times as long as one over 1), so no draft is taken "
        "to be worth its time; start again while nothing else runs."
    )
    assert sum("measuring" in note for note in notes) == 1
    assert not (bundle / COSTS).exists()
    assert llm.tuning.costs.hinge.k_max == 1
    planner = llm.loop.planner  # which is not to learn from what else runs here
    planner.observe = lambda iteration: None
    llm.generate([[5, 6, 7]] * 2, SamplingParams(24, ignore_eos=True))
    assert llm.counters.drafted_tokens == 0


def test_a_calibration_that_other_work_disturbs_is_refused(bundle, prompts, disturbed):
    with refused("other work disturbed", "2 tokens took 501 times", "echo-trt calibrate again while nothing else runs"):
        calibrate(bundle, prompts)
    assert not (bundle / COSTS).exists()
    assert not (bundle / CALIBRATION).exists()


@pytest.mark.parametrize("name", [CALIBRATION, "calibration.html"])
def test_prompts_are_not_overwritten(name, bundle, prompts):
    prompts.rename(bundle / name)
    before = (bundle / name).read_bytes()
    with refused(f"--prompts {bundle / name}", "calibrate writes", "another"):
        calibrate(bundle, bundle / name)
    assert (bundle / name).read_bytes() == before
