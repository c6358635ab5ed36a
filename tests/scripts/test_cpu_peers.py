"""The comparison of CPU peers: its table, and engines that do not run here."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from checkout import needs_git

from echo_trt_lab.cpu_peers.table import markdown

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "cpu_peers.py"


def row(policy: str, rate: float | None, ratio: float | None, **more: object) -> dict:
    rates = {"decode_tokens_per_s": rate, "end_to_end_tokens_per_s": 20.0, "prefill_tokens_per_s": 512.4}
    ratios = {"ratio": ratio, "end_to_end_ratio": 1.0}
    latencies = {"ttft_ms": {"p50": 10.2, "p99": 31.0}, "time_per_token_ms": {"p50": 4.0, "p99": 5.0}}
    return {"batch": 8, "policy": policy, "same_texts": "3 of 4", **rates, **ratios, **latencies, **more}


def test_the_table_has_ours_once_and_a_row_for_every_peer():
    first = {"precision": "bf16", "results": [row("autoregressive", 50, 1), row("vllm", 60, 1.2, drafts=None)]}
    second = {"precision": "bf16", "results": [row("autoregressive", 70, 1), row("genai", None, None, drafts="a tree")]}
    lines = markdown([first, second]).splitlines()
    assert lines[2:] == [
        "| 8 | ours, plain | bf16 | 60.0 | 1.00 | 20.0 | 1.00 | 512 | 10 / 31 | 4 / 5 | 6/8 |",
        "| 8 | vllm | bf16 | 60.0 | 1.20 | 20.0 | 1.00 | 512 | 10 / 31 | 4 / 5 | 3/4 |",
        "| 8 | genai (a tree) | bf16 | - | - | 20.0 | 1.00 | 512 | 10 / 31 | 4 / 5 | 3/4 |",
    ]
    assert {line.count("|") for line in lines} == {12}


@needs_git
def test_an_engine_that_does_not_run_is_left_out_with_a_reason(bundle_of, tmp_path, capsys):
    main, folder = runpy.run_path(str(SCRIPT))["main"], tmp_path / "peers"
    main([bundle_of("lookup")], engines="vllm-eagle3,llama.cpp", folder=folder, json_file=tmp_path / "peers.json")
    output = capsys.readouterr()
    left_out = json.loads((tmp_path / "peers.json").read_text())["left_out"]
    assert list(left_out) == ["lookup: vllm-eagle3", "lookup: llama.cpp"]
    assert "kind lookup" in left_out["lookup: vllm-eagle3"]
    assert "GGUF" in left_out["lookup: llama.cpp"]
    assert output.out == ""
    assert output.err.count("is left out: ") == 2
