"""Published figures: all from one stored run, rendered the same each time."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "publish.py"
publish = type("publish", (), runpy.run_path(str(SCRIPT)))
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def run() -> dict:
    return json.loads((ROOT / "docs" / "benchmarks.json").read_text())


def written_block() -> str:
    return README.partition(publish.BEGIN + "\n")[2].partition("\n" + publish.END)[0]


def test_readme_and_page_are_the_stored_run_s(run):
    assert written_block() == publish.block(run)
    earlier = yaml.safe_load(publish.EARLIER.read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == publish.page(run, earlier)


def test_readme_s_figures_stand_in_the_page(run):
    cells = [line for line in written_block().splitlines() if line.startswith(("| plain", "| fixed", "| default"))]
    assert len(cells) == len(publish.SHOWN)
    page = set(NUMBER.findall((ROOT / "docs" / "benchmarks.md").read_text()))
    assert set(NUMBER.findall("".join(cells))) <= page


def test_a_run_says_where_it_comes_from(run):
    assert run["published"].keys() == {"commit", "date", "command", "trial"}
    assert "/" not in run["published"]["command"].replace("scripts/benchmarks/", "").replace("bundles/", "")
    page = " ".join((ROOT / "docs" / "benchmarks.md").read_text().replace("\\\n", " ").split())
    made = run["published"]
    for word in (publish._machine(run), made["commit"], made["date"], made["command"]):
        assert word in page


def test_a_short_run_is_called_a_trial(run):
    for trial in (True, False):
        run = run | {"published": run["published"] | {"trial": trial}}
        for text in (publish.block(run), publish.page(run, [])):
            assert ("not a result" in text) == trial


def test_a_readme_without_markers_is_left_alone():
    with pytest.raises(SystemExit, match=r"README\.md lacks the lines"):
        publish.with_block("# echo-trt\n", "a table")


def test_the_page_says_who_proposed_the_tokens(run):
    """From the run's counts: prompt lookup and earlier answers come before the head where they brought more."""
    default = next(row for row in run["results"] if (row["policy"], row["batch"]) == ("goodput", 1))
    counts = default["accepted_by_source"]
    output = publish._proposers(run)
    for source, name in publish.SOURCES.items():
        share = counts.get(source, 0) / sum(counts.values())
        assert (f"{share:.0%} {name}" in output) == (share >= 0.005)


def test_the_page_counts_the_texts_of_the_lossless_matrix(run):
    page = publish.page(run, [])
    for mode, rows in run["lossless"].items():
        assert {row["policy"] for row in rows} == {name for name in publish.POLICIES if name != publish.PLAIN}
        equal, texts = (sum(row[name] for row in rows) for name in ("identical", "requests"))
        assert f"{mode}, 1 and 8 requests | token for token | {equal:,} of {texts:,}" in page


def test_a_bundle_is_measured_and_published(bundle_of, tmp_path):
    run = publish.measure(bundle_of("close"), [publish.DEMO], 2, 1, 4, bundle_of("close"))
    assert all(row["identical"] == row["requests"] for rows in run["lossless"].values() for row in rows)
    assert {row["policy"] for row in run["results"]} == set(publish.NAMES)
    assert {row["batch"] for row in run["results"]} == {1, 2, 4, 8, 16}
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    publish.write(run, tmp_path)
    stored = json.loads((tmp_path / "docs" / "benchmarks.json").read_text())
    assert stored == run
    assert publish.block(stored) in (tmp_path / "README.md").read_text()
    for name in ("drafted.svg", "iteration.svg", "speedup.svg"):
        assert (tmp_path / publish.IMAGES / name).read_text().startswith("<?xml")


def test_nothing_to_measure_is_a_sentence():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "give a bundle to measure, or --from with a stored run" in " ".join(done.stderr.replace("│", " ").split())
