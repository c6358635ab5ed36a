import io
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from ngram_tables import table
from refusal import refused
from rich.console import Console
from synthetic import recorded

from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt_lab.calibration.fit import fit
from echo_trt_lab.ngram_tables import write_ngrams
from echo_trt_lab.options import gates_of
from echo_trt_lab.simulation.command import POLICIES, run
from echo_trt_lab.simulation.options import SimulateOptions


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> SimulateOptions:
    folder = tmp_path_factory.mktemp("simulation")
    trees = recorded([40, 30, 50, 45] * 3, 4, 2, 3)
    (folder / "trees.npz").write_bytes(trees.to_bytes())
    write(folder, CALIBRATION, fit(trees, "target", "draft", 4, 2, 3))
    return SimulateOptions(
        folder / "trees.npz",
        calibration=folder / CALIBRATION,
        machine="h100-qwen3-8b",
        batches=(1, 16),
        policies=("oracle", "goodput"),
    )


def simulate(job: SimulateOptions, **changes) -> tuple[dict, str]:
    out = Console(file=io.StringIO(), width=80)  # which is not enough for the table
    result = run(replace(job, **({"tokens": 200} | changes)), out, Console(file=io.StringIO()))
    return result, out.file.getvalue()


def test_a_row_for_each_policy_and_batch_and_plain_decoding_first(job, tmp_path):
    result, shown = simulate(job, json_file=tmp_path / "out.json")
    rows = [(r["batch"], r["policy"]) for r in result["results"]]
    assert rows == [(b, p) for b in (1, 16) for p in ("autoregressive", "oracle", "goodput")]
    assert [r["ratio"] for r in result["results"] if r["policy"] == "autoregressive"] == [1, 1]
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert "h100-qwen3-8b, K_max 192, static 4/2/8" in shown
    assert "of drafts used" in shown  # whole, though nobody's terminal is that wide
    assert "…" not in shown
    assert "3.35 TB/s" in " ".join(result["assumptions"])
    assert "above batch 12 several requests walk one recorded answer" in " ".join(result["assumptions"])
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_more_seeds_walk_more_of_the_answers(job):
    """Plain decoding's rate is the same in any order, and the interval of a ratio to itself is a point."""
    once, thrice = simulate(job)[0]["results"], simulate(job, seeds=3)[0]["results"]
    for few, many in zip(once, thrice, strict=True):
        low, high = many["ratio_interval"]
        assert low <= many["ratio"] <= high
        assert many["iterations"] > 2 * few["iterations"]
        assert (low == high) == (few["policy"] == "autoregressive")


def test_gates_of_the_command_line(job):
    """A threshold that nothing passes leaves plain decoding; one that all pass drafts as deep as the trees go."""
    results = {gate: simulate(job, policies=("echo",), gates=f"1:{gate}")[0]["results"][1] for gate in (0, 1)}
    assert results[1]["accepted_length"] < results[0]["accepted_length"]
    assert gates_of("1:0.2,4:0.3") == {1: 0.2, 4: 0.3}
    for wrong in ("1=2", "0:0.3", "1:2", ""):
        with refused("--gates", "1:0.2,4:0.3"):
            gates_of(wrong)


def test_a_report_has_the_plots_and_all_rows(job, tmp_path):
    file = tmp_path / "r.html"
    result, _ = simulate(job, html_file=file)
    html = file.read_text("utf-8")
    assert html.count("<svg") == 3
    assert html.count("<tr") == 1 + len(result["results"])
    assert "3.35 TB/s" in html
    with refused("--html", "folder that exists"):
        simulate(job, html_file=tmp_path / "no" / "r.html")


def test_n_grams_of_a_table(job, tmp_path):
    file, answers = tmp_path / "ngrams.npz", recorded([40, 30, 50, 45] * 3, 4, 2, 3).answers.tolist()
    write_ngrams(table({(a,): (b, 0.9) for a, b in pairwise(answers)}, 1), file, "target")
    without, with_them = simulate(job)[0], simulate(job, ngrams=file)[0]
    for before, after in zip(without["results"], with_them["results"], strict=True):
        named = after["policy"] in ("goodput", "oracle")
        assert (after["accepted_length"] > before["accepted_length"]) == named
    assert "without n-grams" in " ".join(without["assumptions"])
    assert "n-grams go on" in " ".join(with_them["assumptions"])
    write_ngrams(table({(1,): (2, 0.9)}, 1), file, "another")
    for path, words in ((file, ("another target's",)), (tmp_path / "none", ("none", "cannot be read"))):
        with refused(*words, "recorded", "leave --ngrams out"):
            simulate(job, ngrams=path)


def test_bad_input(job, tmp_path):
    for changes, words in (
        ({"policies": ("greedy",)}, ("--policies", "'greedy'", *POLICIES)),
        ({"batches": (4, 0)}, ("--batch", "0", "positive")),
        ({"batches": ()}, ("--batch", "empty")),
        ({"batches": (4097,)}, ("--batch", "4097", "up to 4096")),
        ({"tokens": 10**9}, ("--tokens", 10**9, "1 to 1000000")),
        ({"policies": ("static",), "static": (5, 2, 9)}, ("static", "max_depth 5", "have 4")),
        ({"policies": ("static",), "static": (3, 5, 9)}, ("static", "beams 5", "have 2")),
        ({"static": (3, 0, 9)}, ("--static", "3,0,9")),
        ({"recording": tmp_path / "none.npz"}, ("none.npz", "cannot be read")),
        ({"calibration": tmp_path / "none.json"}, ("none.json", "cannot be read")),
        ({"calibration": job.recording}, ("trees.npz", "calibrate")),
    ):
        with refused(*words):
            simulate(job, **changes)


def test_a_file_that_it_reads_is_not_overwritten(job):
    for file in (job.recording, job.calibration):
        before = file.read_bytes()
        with refused(f"--json {file}", "reads", "another file"):
            simulate(job, json_file=file)
        with refused(f"--html {file}", "reads", "another file"):
            simulate(job, html_file=file)
        assert file.read_bytes() == before
