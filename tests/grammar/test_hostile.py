"""Grammars meant to hang or kill a server are answered within two seconds of CPU: refused, or with a state to go on.

A long text under one of them costs no more than every text's grammar may.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from walks import allowed, choose, compiler, ends

from echo_trt.errors import UserError
from echo_trt.grammar.state import AT_ONCE_S, PER_TOKEN_S, GrammarFailed, State

SECONDS = 2.0  # of CPU, for compiling and some steps
STEPS = 12
TOKENS = 1000  # of a long text
START_S = 1  # of CPU, that another interpreter may take to begin
LONG_S = 0.08  # of CPU, for five steps of a long forced text


def nested(depth: int, outer: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {outer: schema if outer == "items" else [schema]}
    return schema


def chain(length: int, link) -> dict[str, Any]:
    """Definitions that refer to the next one each."""
    names = {f"a{i}": link({"$ref": f"#/$defs/a{i + 1}"}) for i in range(length)}
    return {"$defs": names | {f"a{length}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def record(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


HOSTILE: dict[str, dict[str, Any]] = {
    "items 100,000 deep": {"json": nested(100_000)},
    "items 120 deep": {"json": nested(120)},
    "anyOf 900 deep": {"json": nested(900, "anyOf")},
    "2^30 ways to null": {"json": chain(30, lambda ref: {"anyOf": [ref, ref]})},
    "2^30 intersections": {"json": chain(30, lambda ref: {"allOf": [ref, ref]})},
    "2^14 intersections": {
        "json": {"allOf": [{"anyOf": [record({f"p{i}": {"const": j}}) for j in (0, 1)]} for i in range(14)]}
    },
    "patterns that meet": {"json": {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(1, 12)]}},
    "60,000 values": {"json": {"enum": [f"v{i}" for i in range(60_000)]}},
    "14,000 values": {"json": {"enum": [f"v{i}" for i in range(14_000)]}},
    "60,000 choices": {"choice": [f"v{i}" for i in range(60_000)]},
    "10,000 properties": {"json": {"type": "object", "properties": {f"k{i}": {} for i in range(10_000)}}},
    "400 optional properties": {"json": {"type": "object", "properties": {f"k{i}": True for i in range(400)}}},
    "a million characters": {"json": {"type": "string", "minLength": 10**6, "maxLength": 10**9}},
    "100,000 entries": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**5, "maxItems": 10**5}},
    "(a+)+$": {"regex": "(a+)+$"},
    "(a|a)*b...": {"regex": "(a|a)*b{1,1000}(c{1,1000}){1,1000}"},
    "(a|a)*b... as a pattern": {"json": {"type": "string", "pattern": "^(a|a)*b{1,1000}(c{1,1000}){1,1000}$"}},
    "repeats of repeats": {"regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
    "a thousand behind any": {"regex": ".*a.{1000}"},
    "any behind any": {"regex": "(.*a){20}.*b.{100}"},
    "letters of all scripts": {"regex": "(?i)(\\w{1,100}\\W){1,100}"},
    "60,000 stars": {"regex": "a" + "*" * 60_000},
    "60,000 brackets": {"regex": "(" * 60_000 + "a" + ")" * 60_000},
    "14,000 alternatives": {"regex": "|".join(f"ab{i}" for i in range(14_000))},
    "Lark, 60,000 brackets": {"grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "Lark, repeats": {"grammar": 'start: (("ab"{1,1000}){1,1000}){1,1000}'},
    "Lark, ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a"'},
    "Lark, 20,000 symbols": {"grammar": "start: " + ' "a"' * 20_000},
    "GBNF, 2,000 brackets": {"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000},
    "1 MB of a schema": {"json": {"const": "a" * 2**20}},
    "1 MB of a regex": {"regex": "a" * 2**20},
    "1 MB of a choice": {"choice": ["a" * 2**20]},
    "1 MB of Lark": {"grammar": f'start: "{"a" * 2**20}"'},
    "128 KB of words": {"json": {"description": "a" * 130_000, "type": "integer"}},
}
#: Those whose masks take longer the longer the text is.
AMBIGUOUS = {
    "Lark, ambiguous": HOSTILE["Lark, ambiguous"],
    "Lark, ambiguous pairs": {"grammar": 'start: s\ns: s s | "a"'},
}
#: Those that llguidance gives up on behind the first token; a request fails there instead of being refused.
LATE: dict[str, dict[str, Any]] = {
    "10,000 choices": {"choice": [f"v{i}" for i in range(10_000)]},
    "1,500 optional properties": {
        "json": {"type": "object", "properties": {f"k{i}": {"type": "null"} for i in range(1500)}}
    },
    "Lark without an end": {"grammar": 'start: "a" start'},
}
#: Those that kill the process (its stack overflows), or keep it busy.
DEADLY: dict[str, dict[str, Any]] = {
    "1,400 arrays by reference": {"json": chain(1400, lambda ref: {"type": "array", "items": ref})},
    "1,500 intersections": {"json": chain(1500, lambda ref: {"type": "integer", "allOf": [ref]})},
    "3,000 rules": {"grammar": "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(4000)) + '\nr4000: "b"'},
    "a large divisor": {"json": {"type": "integer", "multipleOf": 1_000_003}},
}
#: What is forced here is long; a few tokens of it are asked for at each step.
LONG: dict[str, dict[str, Any]] = {
    "20,000 characters": {"json": {"const": "a" * 20_000}},
    "1,000 properties": {"json": record({f"k{i}": {"type": "null"} for i in range(1000)})},
}


def answered(structured: dict[str, Any], steps: int = STEPS) -> None:
    """Compile and take some steps; a refusal is an answer."""
    try:
        state = GRAMMARS.begin(structured)
    except UserError:
        return
    draw = np.random.default_rng(0)
    for _ in range(steps):
        if state.ended:
            return
        state.forced(16)
        state = state.after(choose(state, draw, hurry=False))


@pytest.fixture(scope="module", autouse=True)
def _ready():
    """Read the tokenizer before times are taken."""
    answered({"choice": ["a"]})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_answered_soon(name):
    begin = time.process_time()
    answered(HOSTILE[name])
    assert time.process_time() - begin < SECONDS


def written(state: State) -> int:
    """Write a text of TOKENS tokens, unless it must end before; returns its tokens. Raises GrammarFailed."""
    draw = np.random.default_rng(0)
    for number in range(TOKENS):
        state.forced(16)
        options = [token for token in allowed(state).tolist() if token not in ends()]
        if not options:
            return number
        state = state.after(options[draw.integers(len(options))])
    return TOKENS


@pytest.mark.parametrize("name", HOSTILE | AMBIGUOUS)
def test_a_long_text_costs_what_its_tokens_may(name):
    structured, tokens = (HOSTILE | AMBIGUOUS)[name], TOKENS
    try:
        state = GRAMMARS.begin(structured)
    except UserError:
        return
    begin = time.thread_time()
    try:
        tokens = written(state)
    except GrammarFailed:
        assert time.thread_time() - begin < SECONDS
    assert time.thread_time() - begin < SECONDS + AT_ONCE_S + PER_TOKEN_S * tokens


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_grammar_ends_its_text(name):
    with pytest.raises(GrammarFailed):
        written(GRAMMARS.begin(AMBIGUOUS[name]))


@pytest.mark.parametrize("name", LATE)
def test_grammars_that_fail_at_once_are_refused(name):
    answered(LATE[name])


@pytest.mark.parametrize("name", LONG)
def test_long_forced_texts_cost_little(name):
    state = GRAMMARS.begin(LONG[name])
    begin = time.process_time()
    for _ in range(5):
        state = state.after(state.forced(16)[0])
    assert time.process_time() - begin < LONG_S


@pytest.mark.parametrize("name", DEADLY)
def test_no_grammar_ends_the_process(name):
    """Tried in a process of its own."""
    code = "import json, sys, test_hostile; test_hostile.answered(json.load(sys.stdin))"
    limit = int(SECONDS) + START_S
    tried = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(DEADLY[name]),
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    assert tried.returncode == 0, tried.stderr[-500:]


GRAMMARS = compiler()
