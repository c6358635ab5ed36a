"""Tokens coloured by who proposed them, and the draft tree beside the text."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from itertools import groupby

import pytest
from refusal import refused
from rich.console import Console
from rich.text import Text

from echo_trt.cli.generate import run
from echo_trt.cli.options import GenerateOptions
from echo_trt.cli.terminal import Screen, wants_colour
from echo_trt.engine.params import Delta, TokenSource
from echo_trt_lab.sourced_text import STYLES, SourcedText, legend

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def reported(*sources: str) -> list[TokenSource]:
    return [TokenSource(1, source) for source in sources]


def spans(text: Text) -> list[tuple[str, str]]:
    """Pieces of ``text`` with the source whose look they have."""
    names, pieces = {style: name for name, style in STYLES.items()}, []
    looks = ["target"] * len(text)
    for span in text.spans:
        looks[span.start : span.end] = [names[span.style]] * (span.end - span.start)
    for look, group in groupby(zip(looks, text.plain, strict=True), key=lambda pair: pair[0]):
        pieces.append(("".join(letter for _, letter in group), look))
    return pieces


def test_text_has_the_look_of_its_tokens():
    text = SourcedText()
    assert spans(text.add(Delta(0, "one tw", None, reported("target", "head"), [0, 3]))) == [
        ("one", "target"),
        (" tw", "head"),
    ]
    # A source may come before its text, and a text's end after its beginning.
    assert spans(text.add(Delta(0, "o", None, reported("ngram", "lookup"), []))) == [("o", "head")]
    assert spans(text.add(Delta(0, " three!", None, reported(), [7, 13]))) == [(" three", "ngram"), ("!", "lookup")]
    assert text.text == text.styled().plain == "one two three!"
    assert spans(SourcedText().add(Delta(0, "all of it"))) == [("all of it", "target")]
    assert dict(text.counts) == {"target": 1, "head": 1, "ngram": 1, "lookup": 1}
    assert legend(text.counts).plain == "tokens from: target itself 25%  draft 25%  copied text 25%  n-gram 25%"


@pytest.mark.parametrize(
    ("choice", "terminal", "environment", "coloured"),
    [
        ("auto", True, {"TERM": "xterm"}, True),
        ("auto", False, {"TERM": "xterm"}, False),
        ("auto", True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
    ],
)
def test_colour_follows_the_terminal_unless_it_is_told(choice, terminal, environment, coloured):
    console = Console(file=StringIO(), force_terminal=terminal, _environ=environment)
    assert wants_colour(console, choice) == coloured


def answer(bundle, *words: str, env: dict[str, str] | None = None) -> str:
    call = [sys.executable, "-m", "echo_trt", "generate", str(bundle), "abc abc abc", "--max-tokens", "12", *words]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | (env or {}))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(bundle_of) -> str:
    """Return what a pipe gets."""
    return answer(bundle_of("close"))


def test_colours_change_no_text(bundle_of, plain):
    assert "\x1b" not in plain
    assert "tokens from" not in plain
    coloured = answer(bundle_of("close"), "--color", "always", env={"NO_COLOR": "1"})
    assert "\x1b[" in coloured
    assert ESCAPES.sub("", coloured).partition("tokens from: ")[0] == plain
    assert "%" in coloured.partition("tokens from: ")[2]


def test_watching_needs_a_terminal_and_one_policy(bundle_of):
    job = GenerateOptions(bundle_of("close"), "abc", watch=True)
    with refused("--watch", "terminal", "leave it out"):
        run(job, Screen(file=StringIO()), Screen(file=StringIO()))
    both = replace(job, compare=True)
    with refused("--watch", "--compare", "leave one"):
        run(both, Screen(file=StringIO(), force_terminal=True), Screen(file=StringIO()))


def test_a_tree_is_drawn_beside_the_text(bundle_of, plain):
    """In a real terminal: what is left at the end is the text that a pipe gets."""
    own, terminal = pty.openpty()
    call = [sys.executable, "-m", "echo_trt", "generate", bundle_of("close"), "abc abc abc", "--max-tokens", "12"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([*call, "--watch"], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([own], [], [], 1)[0]:
            continue
        try:
            piece = os.read(own, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        seen += piece
    os.close(own)
    assert process.wait(10) == 0
    shown = ESCAPES.sub("", seen.decode()).replace("\r\n", "\n")
    for words in ("tree of the iteration", "tokens verified", "drafts accepted", "tokens from: "):
        assert words in shown
    assert plain.strip() in shown.rpartition("tree of the iteration")[2]
