"""The lines that README, docs and examples give a client, run as they stand but for the ports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served, needs_triton

ROOT = Path(__file__).parents[3]
PAGES = ("triton-api", "openai-api", "quickstart-cpu", "from-ollama", "latency-targets", "troubleshooting")
DOCS = (
    "README.md",
    *(f"docs/{name}.md" for name in PAGES),
)
EXAMPLE = ROOT / "examples" / "server_client.py"
QUESTION = {"text_input": "Why is the sky blue?", "chat": True}
pytestmark = needs_triton
TRITON = True


def blocks(language: str) -> list[tuple[str, str]]:
    """(file, block) of those that ask a server."""
    found = []
    for file in DOCS:
        for block in re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL):
            if "localhost:" in block:
                found.append((file, block))
    return found


def commands() -> list[tuple[str, str]]:
    """(file, command) that begin with curl, with their continuation lines."""
    return [
        (file, command)
        for file, block in blocks("")
        for command in re.findall(r"^(?:\$ )?(curl (?:.*\\\n)*.*)", block, re.MULTILINE)
        if "-d " in command
    ]


CURLS, SNIPPETS = commands(), blocks("python")


def run(server: Served, words: list[str], text: str) -> str:
    for usual, real in ((8000, server.http), (8001, server.grpc), (9000, server.openai), (11434, server.openai)):
        text = text.replace(f"localhost:{usual}", f"127.0.0.1:{real}")
    try:
        done = subprocess.run([*words, text], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(
            f"ended not within 180 s; printed {late.stdout}; the server: {server.err[-2000:]}"
        ) from late
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_such_lines_for_every_client():
    text = "".join(block for _, block in CURLS + SNIPPETS)
    words = {"generate ", "generate_stream", "chat/completions", "tritonclient.grpc", "tritonclient.http", "openai"}
    assert {word for word in words if word in text} == words
    assert {file for file, _ in CURLS + SNIPPETS} == set(DOCS)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("command", [command for _, command in CURLS])
def test_curl(server, command):
    answer = run(server, ["bash", "-c"], command)
    if '"stream": true' not in command and "/v2/" not in command and "/api/" not in command:
        answer = json.loads(answer.rpartition("\n\n")[2].rpartition("\r\n\r\n")[2])
        assert answer.keys() & {"choices", "ttft_ms"} or answer["error"]["param"] in command
        return
    if "/v1/" in command:
        lines = [line.removeprefix("data: ") for line in answer.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] in ("stop", "length")
        return
    if "/api/" in command:
        assert json.loads(answer.splitlines()[-1])["done"]
        return
    pieces = [json.loads(line.removeprefix("data: ")) for line in answer.split("\n\n") if line.strip()]
    assert "".join(piece["text_output"] for piece in pieces) == expected(server)


@pytest.mark.parametrize("snippet", [block for _, block in SNIPPETS], ids=lambda block: block.split("import ")[1][:12])
def test_python(server, snippet):
    pytest.importorskip(snippet.split("import ")[0].split()[-1] if snippet.startswith("from") else "tritonclient")
    limit = 64 if "64" in snippet else 480
    assert run(server, [sys.executable, "-c"], snippet) == expected(server, limit)


def test_example(server):
    pytest.importorskip("openai")
    text, _, used = run(server, [sys.executable, "-c"], EXAMPLE.read_text()).rpartition("\n[")
    assert text == expected(server)
    assert re.fullmatch(r"\d+ prompt tokens, \d+ answered\]\n", used)


def expected(server: Served, limit: int = 64) -> str:
    text = server.generate(**QUESTION, max_tokens=limit)["text_output"]
    assert text
    return text
