"""Published figures: all from one stored run, rendered the same each time."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml
from checkout import needs_git

from echo_trt.engine.llm import LLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "publish.py"
publish = type("publish", (), runpy.run_path(str(SCRIPT)))
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def run() -> dict:
    return json.loads((ROOT / "docs" / "benchmarks.json").read_text())


def written_block() -> str:
    return README.partition(publish.BEGIN + "\n")[2].partition("\n" + publish.END)[0]


def test_readme_and_page_are_the_stored_run_s(run):
    assert written_block() == publish.block(run)
    earlier = yaml.safe_load(publish.EARLIER.read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == publish.page(run, earlier)


def test_a_short_run_is_called_a_trial(run):
    for trial in (True, False):
        run = run | {"published": run["published"] | {"trial": trial}}
        for text in (publish.block(run), publish.page(run, [])):
            assert ("not a result" in " ".join(text.split())) == trial


@needs_git
def test_a_bundle_is_measured_and_published(bundle_of, tmp_path, monkeypatch):
    known = publish.measure.__globals__  # fewer cells than are published
    fewer = {"BATCHES": "1,2", "LOSSLESS_BATCHES": "2", "LOSSLESS_TOKENS": 12}
    for name, value in (*fewer.items(), ("LOSSLESS", {"sampled": known["LOSSLESS"]["sampled"]})):
        monkeypatch.setitem(known, name, value)
    LLM(bundle_of("close"), "goodput")  # measures costs, which the processes below would do for longer
    run = publish.measure(bundle_of("close"), [publish.DEMO], 2, 1, 4, bundle_of("close"))
    assert all(row["identical"] == row["requests"] for rows in run["lossless"].values() for row in rows)
    assert {row["policy"] for row in run["results"]} == set(publish.NAMES)
    assert {row["batch"] for row in run["results"]} == {1, 2}
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    publish.write(run, tmp_path)
    stored = json.loads((tmp_path / "docs" / "benchmarks.json").read_text())
    assert stored == run
    assert publish.block(stored) in (tmp_path / "README.md").read_text()
    for name in ("drafted.svg", "iteration.svg", "speedup.svg"):
        assert (tmp_path / publish.IMAGES / name).read_text().startswith("<?xml")
