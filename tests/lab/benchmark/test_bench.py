"""``echo-trt bench`` on a tiny pair: the figures it writes, and what it refuses before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from refusal import refused
from rich.console import Console

from echo_trt.engine.params import SamplingParams
from echo_trt.files.prompts import Prompt
from echo_trt_lab.benchmark import command
from echo_trt_lab.benchmark.closed_loop import ClosedLoop, StepSample, run_side_by_side
from echo_trt_lab.benchmark.command import conversation_ids, drawn
from echo_trt_lab.benchmark.command import run as run_bench
from echo_trt_lab.benchmark.figures import figures
from echo_trt_lab.benchmark.options import BenchOptions
from echo_trt_lab.calibration.trees import Trees
from echo_trt_lab.side_by_side import side_by_side


@pytest.fixture
def prompts(tmp_path) -> list[Path]:
    files = []
    for name in ("first", "second"):
        rows = [{"id": i, "prompt": f"{name} {i} abc abc abc"} for i in range(3)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        files.append(file)
    return files


def job(bundle: Path, prompts: list[Path], **changes) -> BenchOptions:
    values = {"policies": ("goodput", "static"), "batches": (1, 3), "max_tokens": 16, "rounds": 2, "requests": 4}
    return BenchOptions(bundle, prompts=prompts, **{**values, **changes})


def bench(job: BenchOptions) -> dict:
    return run_bench(job, Console(quiet=True), Console(quiet=True))


def test_a_budget_bounds_the_policies_that_share_one(bundle_of, prompts):
    result = bench(job(bundle_of("close"), prompts, policies=["echo", "static"], batches=[2], rounds=1, budget=5))
    echo, static = (next(r for r in result["results"] if r["policy"] == name) for name in ("echo", "static"))
    assert 2 < echo["verified_per_iteration"] <= 5 < static["verified_per_iteration"]
    assert 0.4 < echo["budget_used"] <= 1
    assert static["budget_used"] is None
    low, high = echo["ratio_interval"]
    assert 0 < low < high
    with refused("--budget is 0", "1 or more"):
        bench(job(bundle_of("close"), prompts, budget=0))
    with refused("--budget is 8", "none of goodput shares one", "add echo to --policies"):
        bench(job(bundle_of("close"), prompts, policies=["goodput"], budget=8))


def test_sampled_texts_are_plain_decodings(bundle_of, prompts):
    given = {"policies": ["static"], "batches": [2], "rounds": 1}
    cells = [bench(job(bundle_of("close"), prompts, **given, **p)) for p in ({}, {"temperature": 1.0, "seed": 3})]
    lengths = [cell["results"][1]["accepted_length"] for cell in cells]
    assert [cell["results"][1]["same_texts"] for cell in cells] == ["4 of 4"] * 2
    assert lengths[0] != lengths[1]


def test_a_measured_budget_is_the_planners(bundle_of, prompts):
    """A pass is padded to the next size, and so is the budget."""
    result = bench(job(bundle_of("close"), prompts, policies=["echo"], batches=[2], rounds=1))
    (echo,) = (row for row in result["results"] if row["policy"] == "echo")
    assert 0 < echo["budget_used"] <= 1


def test_targets_are_shown_beside_the_policy_that_knows_of_none(bundle_of, prompts):
    given = {"policies": ("goodput",), "batches": (2,), "rounds": 1, "targets": (60_000.0, 60_000.0)}
    result = bench(job(bundle_of("close"), prompts, **given))
    assert [(row["policy"], row["attained"]) for row in result["results"]] == [
        ("autoregressive", 1.0),
        ("goodput", 1.0),
        ("goodput with targets", 1.0),
    ]
    assert all(row["targeted_per_token_ms"]["p90"] > 0 for row in result["results"])


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
        lowest, highest = row["ratio_spread"]  # of rounds, which weigh differently in the sums of both policies
        assert 0.9 * lowest <= row["ratio"] <= 1.1 * highest
        assert row["side_by_side"]
        if row["policy"] == "autoregressive":
            assert row["accepted_length"] == row["ratio"] == 1
            assert row["accepted_by_source"] == {}
            assert row["verified_per_iteration"] == row["batch"]
        if row["policy"] == "goodput":
            # Sources are of the whole run, and the utilisation of its iterations with every slot decoding.
            assert not row["draft_utilisation"] or sum(row["accepted_by_source"].values()) > 0
        if row["policy"] == "static":
            assert row["accepted_length"] > 1.5
            assert row["phases_ms"]["draft"] > 0
    html = html_file.read_text("utf-8")
    assert html.count("<svg") == html.count("<figcaption>") == 4
    assert all(table.count("<tr") == 1 + len(result["results"]) for table in html.split("<table>")[1:])
    assert result["machine"] in html


def test_every_slot_is_busy_until_the_last_prompt_is_answered(open_llm):
    """Were slots left empty at the end, the slowest texts would be those that are not counted."""
    llm = open_llm("close", "autoregressive", batch=3)
    run = ClosedLoop(llm.loop, [[5, 6, 7]] * 4, 3, SamplingParams(12))
    run.run()
    sample = run.sample
    assert sample.decode.verifications == 3 * sample.decode.iterations
    assert sample.whole.iterations > sample.decode.iterations  # prompts were computed in some
    assert sorted(sample.texts) == [0, 1, 2, 3]
    assert len(sample.ttft) == len(sample.pace) == 4
    assert sum(map(len, sample.texts.values())) == len(sample.ttft) + len(sample.gaps)
    assert sample.whole.tokens > sum(map(len, sample.texts.values()))  # second answers, which end with the last first
    assert sample.whole.elapsed == pytest.approx(run.seconds)
    assert not llm.loop.scheduler.busy
    again = ClosedLoop(llm.loop, [[5, 6, 7]] * 4, 3, SamplingParams(12))
    again.run()
    assert again.sample.texts == sample.texts


def test_prompts_are_drawn_evenly_over_every_file():
    rows = {"a": [Prompt(f"a{i}", "") for i in range(80)], "b": [Prompt(f"b{i}", "") for i in range(3)]}
    assert [prompt.id for prompt in drawn(rows, 8)] == ["a0", "b0", "a20", "b1", "a40", "b2", "a60", "b0"]
    assert [prompt.id for prompt in drawn(rows, 5)] == ["a0", "b0", "a26", "b1", "a53"]
    assert [prompt.id for prompt in drawn({"b": rows["b"]}, 4)] == ["b0", "b1", "b2", "b0"]


def test_a_later_turn_is_asked_behind_the_answers_to_those_before(open_llm):
    llm = open_llm("close", "static", batch=3)
    short, long = Prompt("a", "hello", ("and then?",)), Prompt("b", "there", ("and then?", "and then?"))
    first = conversation_ids(llm, [short, long], 1, 6)
    second, third = conversation_ids(llm, [short, long], 2, 6), conversation_ids(llm, [short, long], 3, 6)
    assert first[short] == llm.chat_ids("hello")
    answer = llm.generate([first[short]], SamplingParams(6))[0].text
    turns = [("user", "hello"), ("assistant", answer), ("user", "and then?")]
    assert second[short] == llm.chat_ids([{"role": role, "content": text} for role, text in turns])
    assert third[short] == second[short]
    assert len(third[long]) > len(second[long]) > len(first[long])


def test_side_by_side_each_emits_what_it_does_alone_in_blocks_of_its_own(open_llm, monkeypatch):
    llm = open_llm("close", "static", batch=3)
    prompts = [[5, 6, 7], [8, 9], [4] * 40, [3, 3, 3], [11, 12]]
    alone = ClosedLoop(llm.loop, prompts, 2, SamplingParams(20))
    alone.run()
    assert not alone.busy
    monkeypatch.setattr("echo_trt_lab.benchmark.closed_loop.SLICE", 0.0)  # turns of one iteration
    loops, held = side_by_side(llm, ("static", "autoregressive", "echo"), budget=6), []
    runs = [ClosedLoop(loop, prompts, 2, SamplingParams(20)) for loop in loops]
    for run in runs:
        for _ in range(3):
            run.run(0.0)
        batch = run.loop.batch
        held.append(
            {b for slot in np.flatnonzero(batch.active) for b in batch.blocks.table[slot, : batch.blocks.held[slot]]}
        )
    assert all(run.busy and run.emitted for run in runs)
    assert all(held)
    assert not held[0] & held[1]
    assert not (held[0] | held[1]) & held[2]
    run_side_by_side(runs)
    assert [run.sample.texts for run in runs] == [alone.sample.texts] * 3
    assert all(run.seconds >= run.sample.whole.elapsed > 0 for run in runs)


def test_a_policy_that_never_decoded_without_prompts_has_no_rate():
    """Large batches of short answers: some prompt is in every iteration."""
    plain, never = StepSample(), StepSample()
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
    ("changes", "output"),
    [
        ({"policies": ["fastest"]}, ("--policies", "'fastest'", "goodput")),
        ({"batches": [0]}, ("--batch", "0", "1 to 4096")),
        ({"policies": []}, ("--policies is empty", "goodput")),
        ({"peers": ["exllama"]}, ("exllama", "transformers")),
        ({"json_file": Path("r"), "html_file": Path("r").absolute()}, ("--json", "--html", "/r", "of its own")),
        ({"json_file": Path("/nowhere/r.json")}, ("--json /nowhere/r.json", "cannot be written")),
        ({"html_file": Path("/nowhere/r.html")}, ("--html", "cannot be written")),
        ({"record_file": Path("/nowhere/r.npz")}, ("--record", "cannot be written")),
    ],
)
def test_refused_before_anything_runs(changes, output, bundle_of, prompts, monkeypatch):
    monkeypatch.setattr(command, "LLM", None)
    with refused(*output):
        bench(job(bundle_of("close"), prompts, **changes))


def test_a_prompt_that_is_too_long_is_named_before_anything_is_measured(bundle_of, tmp_path, monkeypatch):
    file = tmp_path / "long.jsonl"
    file.write_text('{"id": "a", "prompt": "abc"}\n' + json.dumps({"id": "z", "prompt": "word " * 400}))
    monkeypatch.setattr(command, "_cell", None)
    with refused("prompt 'z'", "context is 160", "limits.context"):
        bench(job(bundle_of("close"), [file]))


@pytest.mark.parametrize("option", ["json", "html", "record"])
def test_a_file_that_it_reads_is_not_overwritten(option, bundle_of, prompts, monkeypatch):
    monkeypatch.setattr(command, "LLM", None)
    for file in (prompts[1], bundle_of("close") / "target.onnx"):
        before = file.read_bytes()
        with refused(f"--{option} {file}", "reads", "another file"):
            bench(job(bundle_of("close"), prompts, **{f"{option}_file": file}))
        assert file.read_bytes() == before
