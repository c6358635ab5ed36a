"""The script that compares texts of policies, and of two checkouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(bundle_of, tmp_path) -> list[object]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "the theme"}\n{"id": "b", "turns": ["a thing", "so"]}\n')
    words = ["--prompts", prompts, "--batch", "2", "--policies", "static", "--max-tokens", "12"]
    return [sys.executable, ROOT / "scripts" / "benchmarks" / "lossless.py", bundle_of("close"), *words]


def run(*command: object) -> tuple[int, str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def test_texts_of_a_checkout_are_compared_bit_for_bit(command, tmp_path):
    code, output = run(*command, "--beside", ROOT, "--texts", tmp_path / "texts.json")
    assert code == 0, output
    assert output.count(f"package {ROOT / 'echo_trt'}\n") == 2
    assert "static, 2 requests: 2 of 2 texts are the other run's\n" in output
    texts = json.loads((tmp_path / "texts.json").read_text())
    texts["static, 2 requests"]["prompts.jsonl:1"] = "another"
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code, output = run(*command, "--same-as", tmp_path / "texts.json")
    assert code == 1
    assert output.endswith("static, 2 requests: 1 of 2 texts are the other run's\n  prompts.jsonl:1 is not\n")
