"""The page of the paper's claims, from one command."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from checkout import needs_git
from synthetic import recorded

from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt_lab.bootstrap import interval, pooled, rate
from echo_trt_lab.calibration.fit import fit

ROOT = Path(__file__).parents[3]


def test_a_ratios_interval_is_of_prompts_that_are_drawn_again():
    plain = pooled([{0: (10.0, 1.0), 1: (10.0, 1.0)}, {1: (10.0, 1.0), 2: (20.0, 2.0)}])
    assert plain == {0: (10.0, 1.0), 1: (20.0, 2.0), 2: (20.0, 2.0)}
    assert rate(plain) == 10
    assert interval({each: (2 * t, s) for each, (t, s) in plain.items()}, plain) == (2, 2)  # all prompts alike
    low, high = interval({0: (10.0, 1.0), 1: (40.0, 2.0), 2: (60.0, 2.0)}, plain)
    assert low == 1 < 2 < high == 3  # of the slowest prompt alone, and the fastest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    trees = recorded([24, 20] * 3, 8, 10, 10)
    (folder / "mt.npz").write_bytes(trees.to_bytes())
    write(folder, CALIBRATION, fit(trees, "target", "draft", 8, 10, 10))
    (folder / "docs/img").mkdir(parents=True)
    shutil.copy(ROOT / "docs/paper.md", folder / "docs")
    paper = runpy.run_path(str(ROOT / "scripts/benchmarks/paper.py"))
    given = {"calibration": folder / CALIBRATION, "rows": folder / "rows.jsonl", "docs": folder / "docs"}
    paper["main"]([folder / "mt.npz"], quick=True, **given)
    return paper, folder, given


@needs_git
def test_every_block_of_the_page_is_written(made):
    _, folder, _ = made
    page, before = ((place / "paper.md").read_text() for place in (folder / "docs", ROOT / "docs"))
    assert page.count("<!-- paper.py: end -->") == before.count("<!-- paper.py: end -->") == 7
    assert "1 seeds; 6 answers of mt" in page
    assert page.count("| mt |") == 2
    assert {file.name for file in (folder / "docs/img").iterdir()} == {
        f"paper-{name}.svg" for name in ("budget", "used", "depth")
    }


@needs_git
def test_a_row_has_its_ratios_with_intervals(made):
    _, folder, _ = made
    rows = json.loads((folder / "docs/paper.json").read_text())["rows"]
    assert {row["policy"] for row in rows} >= {
        "autoregressive",
        "static",
        "dense",
        "fixed",
        "echo",
        "goodput",
        "oracle",
    }
    for row in rows:
        ratio, low, high = row["over"]["plain"]
        assert low <= ratio <= high or row["policy"] == "autoregressive"
    assert all(row["verified_per_iteration"] <= max(row["budget"], row["batch"]) for row in rows if row["budget"])


@needs_git
def test_finished_rows_are_not_simulated_again(made, capsys):
    paper, folder, given = made
    page = (folder / "docs/paper.md").read_text()
    capsys.readouterr()
    paper["main"]([folder / "mt.npz"], quick=True, **given)
    assert not capsys.readouterr().out
    assert (folder / "docs/paper.md").read_text() == page


@needs_git
def test_sets_that_are_not_given_keep_their_rows_and_their_commit(made):
    paper, folder, _ = made
    file = folder / "docs/paper.json"
    known = json.loads(file.read_text())
    rows = [row | {"answers": "new"} for row in known["rows"]]
    found = paper["with_kept"](known | {"commit": "c0ffee", "answers": {"new": 3}, "rows": rows}, file)
    assert found["answers"] == {"new": 3, "mt": 6}
    assert found["rows"] == rows + known["rows"]
    made_of = " ".join(paper["tables"](found)["made"].split())
    assert f"Commit c0ffee, 1 seeds; 3 answers of new, 6 answers of mt (commit {known['commit']})." in made_of
    assert paper["with_kept"](known, file) == known
