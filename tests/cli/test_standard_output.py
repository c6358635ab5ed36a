"""A standard output that is closed, full or left by its reader."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def echo_trt(*words: object, **streams) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "echo_trt", *map(str, words)], stderr=subprocess.PIPE, text=True, **streams
    )


def test_a_reader_that_leaves_costs_no_result_file(bundle_of, tmp_path):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "a.json"
    prompts.write_text('{"id": "a", "prompt": "abc"}\n{"id": "b", "prompt": "abc abc"}\n')
    reading, writing = os.pipe()
    os.close(reading)
    words = [bundle_of("lookup"), "--prompts", prompts, "--max-tokens", 4, "--json", file]
    done = echo_trt("generate", *words, stdout=writing)
    os.close(writing)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert '"id": "b"' in file.read_text()


def test_a_closed_standard_output_is_told_in_a_sentence():
    done = echo_trt("--version", preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed; ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_standard_output_is_told_in_a_sentence():
    with open("/dev/full", "w") as full:
        done = echo_trt("--version", stdout=full)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
