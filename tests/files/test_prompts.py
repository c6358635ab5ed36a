"""Prompt files, and how a mistake in one is told."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from refusal import refused

from echo_trt.files.prompts import Prompt, read_prompts


def test_prompt_or_the_first_of_turns(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"id": "a", "prompt": "één"}\n\n{"id": 7, "turns": ["first", "second"], "category": "x"}\n'
        '{"question_id": 81, "turns": ["of MT-bench"]}\n',
        "utf-8",
    )
    assert read_prompts(file) == [Prompt("a", "één"), Prompt("7", "first", ("second",)), Prompt("81", "of MT-bench")]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": "één"}\n', "utf-8-sig")
    assert read_prompts(file) == [Prompt("a", "één")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "\xff"}', ["line 2", "UTF-8"]),
        (b'{"id": 1, "prompt": "x"}\n\n{"id": 2, prompt}', ["line 3", "JSON"]),
        (b'["x"]', ["line 1", "object"]),
        (b'{"id": 1}', ["line 1", "prompt"]),
        (b'{"id": 1, "turns": []}', ["line 1", "turns"]),
        (b'{"id": 1, "turns": ["x", 2]}', ["line 1", "turns"]),
        (b'{"id": 1, "prompt": 5}', ["line 1", "prompt"]),
        (b'{"prompt": "x"}', ["line 1", "id", "None"]),
        (b'{"id": [' + b"1, " * 500 + b'1], "prompt": "x"}', ["line 1", "id is [1, 1,", "…; give a string"]),
        (b'{"id": true, "prompt": "x"}', ["line 1", "id", "True"]),
        (b'{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "y"}', ["id '1'", "twice"]),
        (b'{"id": 1, "prompt": "x\\ud800"}', ["line 1", "prompt", "surrogate", "whole characters"]),
        (b'{"id": "\\udfff", "prompt": "x"}', ["line 1", "id", "surrogate"]),
        (b"[" * 100_000, ["line 1", "recursion", "one object per line"]),
        (b"\n\n", ["no prompt"]),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path, content, words):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with refused(file, *words):
        read_prompts(file)


def test_a_missing_file_is_named(tmp_path):
    with refused(tmp_path / "none.jsonl", "cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_lines_may_end_in_every_way(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"id": 1, "prompt": "x"}\r{"id": 2, "prompt": "y"}\r\n\n{"id": 3}')
    with refused(f"{file}, line 4", "prompt"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("endless", "words"),
    [
        ('yes \'{"id": 1, "prompt": "x"}\'', ["id '1'", "twice"]),
        ('yes \'{"prompt": "x"}\'', ["line 1", "id"]),
        ("yes ''", ["more than 1,000 lines", "a part of it"]),
        ("cat /dev/zero", ["a line is longer than 16 MB", "JSONL file"]),
    ],
)
def test_a_pipe_without_an_end_is_refused(endless, words, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_trt.files.prompts.MAX_LINES", 1000)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(f"{endless} > {shlex.quote(str(pipe))}", shell=True, stderr=subprocess.DEVNULL)
    with writer, refused(pipe, *words):
        read_prompts(pipe)


def test_a_file_of_too_many_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("echo_trt.files.prompts.LARGEST", 1024)
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"".join(b'{"id": %d, "prompt": "x"}\n' % i for i in range(100)))
    with refused(file, "lines or 1,024 bytes", "a part of it"):
        read_prompts(file)
