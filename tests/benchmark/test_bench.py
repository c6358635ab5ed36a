"""``echo-trt bench`` on a tiny pair: the figures it writes, and what it refuses before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusal import refused
from rich.console import Console

from echo_trt.benchmark import command
from echo_trt.benchmark.closed_loop import Sample
from echo_trt.benchmark.closed_loop import run as closed_loop
from echo_trt.benchmark.command import Job, check_pool, run
from echo_trt.benchmark.figures import figures
from echo_trt.calibration.trees import Trees
from echo_trt.runtime.llm import LLM


@pytest.fixture
def prompts(tmp_path) -> list[Path]:
    files = []
    for name in ("first", "second"):
        rows = [{"id": i, "prompt": f"{name} {i} abc abc abc"} for i in range(3)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        files.append(file)
    return files


def job(bundle: Path, prompts: list[Path], **changes) -> Job:
    values = {"policies": ["goodput", "static"], "batches": [1, 3], "max_tokens": 16, "rounds": 2, "requests": 4}
    return Job(bundle, prompts, **{**values, **changes})


def bench(job: Job) -> dict:
    return run(job, Console(quiet=True), Console(quiet=True))


def test_every_policy_has_a_row_at_every_batch_and_the_texts_of_plain_decoding(bundle_of, prompts, tmp_path):
    json_file, html_file = tmp_path / "r.json", tmp_path / "r.html"
    result = bench(job(bundle_of("close"), prompts, json_file=json_file, html_file=html_file, each_file=True))
    assert json.loads(json_file.read_text("utf-8")) == result
    keys = [(row["set"], row["batch"], row["policy"]) for row in result["results"]]
    policies = ("autoregressive", "goodput", "static")
    assert keys == [(s, b, p) for b in (1, 3) for s in ("all", "first", "second") for p in policies]
    for row in result["results"]:
        done, of = row["same_texts"].split(" of ")
        assert done == of == str(2 * max(4, 2 * row["batch"]))
        assert row["decode_tokens_per_s"] > 0
        assert row["ratio_spread"][0] <= row["ratio"] <= row["ratio_spread"][1]
        if row["policy"] == "autoregressive":
            assert row["accepted_length"] == row["ratio"] == 1
            assert row["verified_per_iteration"] == row["batch"]
        if row["policy"] == "static":
            assert row["accepted_length"] > 1.5
            assert row["phases_ms"]["draft"] > 0
    html = html_file.read_text("utf-8")
    assert html.count("<svg") == 1
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_only_iterations_with_every_slot_busy_are_counted(open_llm):
    llm = open_llm("close", "autoregressive", batch=3)
    sample = closed_loop(llm, [[5, 6, 7]] * 4, 3, 12)
    assert sample.decode.verifications == 3 * sample.decode.iterations
    assert sample.whole.iterations > sample.decode.iterations  # prompts were computed in some
    assert len(sample.texts) == len(sample.ttft) == 4
    assert sum(map(len, sample.texts.values())) == len(sample.ttft) + len(sample.gaps)
    assert sample.whole.tokens < sum(map(len, sample.texts.values()))  # the end of the run is left out


def test_a_policy_that_never_decoded_without_prompts_has_no_rate():
    """Large batches of short answers: some prompt is in every iteration."""
    plain, never = Sample(), Sample()
    for tally in (plain.decode, plain.whole, never.whole):
        tally.iterations, tally.elapsed, tally.tokens, tally.verifications = 4, 0.5, 20, 4
    row = figures("static", 64, [never, never], [plain, plain], 8)
    assert (row["decode_tokens_per_s"], row["ratio"], row["ratio_spread"], row["accepted_length"]) == (None,) * 4
    assert (row["end_to_end_tokens_per_s"], row["end_to_end_ratio"]) == (40, 1)
    json.dumps(row, allow_nan=False)


def test_a_recording_holds_a_tree_for_each_token(bundle_of, prompts, tmp_path):
    file = tmp_path / "trees.npz"
    bench(job(bundle_of("close"), prompts, batches=[2], rounds=1, record_file=file))
    trees = Trees.read(file)
    assert trees.groups.tolist() == ["first", "second"]
    lengths = trees.answer_begins[1:] - trees.answer_begins[:-1]
    assert len(trees) == (lengths - 1).sum()  # the first token comes from the prompt, before there is a draft


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": ["fastest"]}, ("--policies", "'fastest'", "goodput")),
        ({"batches": [0]}, ("--batch", "0", "1 to 4096")),
        ({"peers": ["vllm"]}, ("vllm", "transformers")),
        ({"json_file": Path("/nowhere/r.json")}, ("--json /nowhere/r.json", "cannot be written")),
        ({"html_file": Path("/nowhere/r.html")}, ("--html", "cannot be written")),
        ({"record_file": Path("/nowhere/r.npz")}, ("--record", "cannot be written")),
    ],
)
def test_refused_before_anything_runs(changes, said, bundle_of, prompts):
    with refused(*said):
        bench(job(bundle_of("close"), prompts, **changes))


def test_a_batch_that_the_pool_cannot_hold_is_refused(open_llm, bundle_of, prompts):
    llm = open_llm("close", "autoregressive", batch=3)
    check_pool(llm, job(bundle_of("close"), prompts, batches=[3]))
    with refused("--batch 40", "--max-tokens 16", "KV blocks", "kv_blocks in the recipe"):
        check_pool(llm, job(bundle_of("close"), prompts, batches=[3, 40]))


def test_a_single_prompt_is_no_benchmark(bundle_of, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"id": 1, "prompt": "abc"}\n', "utf-8")
    with refused("--prompts", "1 prompt"):
        bench(job(bundle_of("close"), [file]))


def test_every_policy_and_round_computes_its_prompts(bundle_of, tmp_path, monkeypatch):
    """They are the same prompts each time, longer than a block, and the recipe has a prefix cache."""
    file, opened = tmp_path / "long.jsonl", []
    file.write_text("\n".join(json.dumps({"id": i, "prompt": f"{i} abc" * 12}) for i in range(3)), "utf-8")
    monkeypatch.setattr(command, "LLM", lambda *given, **more: opened.append(LLM(*given, **more)) or opened[-1])
    bench(job(bundle_of("close"), [file], policies=["static"], batches=[2], max_tokens=4))
    counters = opened[0].counters
    assert counters.prompt_tokens == counters.asked_tokens > 16 * 40
    assert opened[0].manifest.recipe.limits.prefix_cache
