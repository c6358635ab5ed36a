"""echo-trt inspect on a recipe, as a user runs it: no checkpoint is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from echo_trt.cli.app import main

BUILD = Path(__file__).parents[3] / "build"


@pytest.fixture
def inspect(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["echo-trt", "inspect", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code or 0, *capsys.readouterr()

    return run


def rows(out: str) -> dict[str, str]:
    """First cell -> the others, of every table line."""
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in out.splitlines() if "│" in line]
    return {cells[0]: " | ".join(cells[1:]) for cells in lines}


def test_a_recipe_says_what_it_would_build_and_need(inspect):
    code, out, _ = inspect(BUILD / "qwen3-8b.yaml")
    reported = rows(out)
    assert code == 0
    sizes = "8.19 B parameters, 36 layers, vocabulary 151,936"
    assert reported["target"] == f"Qwen/Qwen3-8B ({sizes}; Qwen/Qwen3-8B as published)"
    assert reported["draft"].startswith(
        "eagle3 AngelSlim/Qwen3-8B_eagle3 (1.02 B parameters, 1 layer, vocabulary 32,000"
    )
    assert reported["weights"] == "target 16.4 GB, draft 2.0 GB"
    assert reported["KV of a token"] == "target 147,456 bytes, draft 4,096 bytes"
    assert reported["KV pool"] == "8,192 blocks, 262,144 tokens, 39.7 GB"
    assert reported["features"] == "8,192 bytes of a token of the pool, 2.1 GB"  # 262,144 x 4,096 x 2 bytes
    assert reported["taken at the start"].startswith("about 1.0 GB: graphs of the target 0.2 GB, graphs of the draft")
    assert "host memory" not in reported
    assert reported["H100-80GB"].split(" | ")[:2] == ["1", "yes"]
    assert reported["H100-80GB"].endswith("222")
    assert reported["L4"].split(" | ")[:2] == ["1", "no"]


def test_a_recipe_for_a_cpu_says_what_it_takes_on_this_machine(inspect, monkeypatch):
    """The whole batch's pool is what memory without a limit would hold, as the pool that a bundle opens here is not."""
    sized = ("Qwen/Qwen3-0.6B", "--engine", "openvino", "--precision", "fp32")  # computed in fp32 on every CPU
    for free, pool, in_all in (
        (24e9, "10.5 GB, 45,760 tokens, 5 requests of 8,192 tokens", "14.6 GB"),
        (900e9, "121.2 GB, 528,384 tokens, 64 requests of 8,192 tokens", "125.3 GB"),
        (4e9, "none: one request of full length takes 0.9 GB more than is free beside the weights", ""),
    ):
        monkeypatch.setattr("echo_trt_lab.sizing.tables.available_memory", lambda free=free: int(free))
        code, out, _ = inspect(*sized)
        reported = rows(out)
        assert code == 0
        assert reported["KV pool here"] == pool
        assert reported["in all"].startswith(in_all and f"{in_all} on this machine; ")
        assert reported["in all"].endswith("; if memory were unlimited, 125.3 GB")
    assert reported["policy"] == "goodput: depth 4, beams 4, width 8"  # it has neither a budget nor gates


def test_a_mixture_of_experts_on_8_gpus_has_two_knees(inspect):
    code, out, _ = inspect(BUILD / "qwen3-235b-a22b.yaml", "--fit", "H100-80GB x8")
    reported = rows(out)
    assert code == 0
    assert "235.09 B parameters, 22.19 B active" in reported["target"]
    assert reported["tensor_parallel"] == "8: what follows is the first GPU's, which has the draft too"
    assert reported["weights"] == "target 60.0 GB, draft 2.4 GB"
    assert reported["KV of a token"] == "target 48,128 bytes, draft 2,048 bytes"  # 4 heads stand twice on 8 GPUs
    *_, dense, routed = (int(n.replace(",", "")) for n in reported["H100-80GB"].split(" | ")[3:] if "GB" not in n)
    assert dense == 222
    assert routed > 2000
    assert "qwen3-235b-a22b on 8 H100-80GB: fits: " in out


def test_a_recipe_for_a_cpu_has_no_cards(inspect):
    code, out, _ = inspect(BUILD / "smollm2-135m.yaml")
    assert code == 0
    assert "135 M parameters, 30 layers" in rows(out)["target"]
    assert rows(out)["KV of a token"] == "target 23,040 bytes, draft 768 bytes"
    assert "H100" not in out
    code, _, err = inspect(BUILD / "smollm2-135m.yaml", "--fit", "H100-80GB")
    assert code == 2
    assert "--fit is about GPUs, but the recipe's engine is cpu" in err


def test_a_model_is_inspected_as_it_would_be_built_on_a_cpu(inspect, monkeypatch):
    monkeypatch.setattr("echo_trt.backends.cuda.device.has_cuda", lambda: False)
    code, out, _ = inspect("Qwen/Qwen3-1.7B", "--precision", "int8", "--max-model-len", 4096, "--max-num-seqs", 8)
    assert code == 0
    assert rows(out)["engine"] == "cpu, int8, the fastest on this CPU"
    assert rows(out)["limits"].startswith("batch 8, context 4,096 tokens, as many as the batch needs and memory holds")
    assert inspect("qwen3-1.7b", "--fit", "L4")[0] == 0


def test_shapes_that_are_not_known_are_said_to_be(inspect, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nengine: tensorrt\ntarget: {path: mine}\n")
    code, out, _ = inspect(file)
    assert code == 0
    assert rows(out)["needs"].startswith("not known: target: mine has no config.json yet")
    code, out, err = inspect(file, "--fit", "L4")
    assert code == 2
    assert out == ""
    assert "target: mine has no config.json yet" in err
