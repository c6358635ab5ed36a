"""Grammars that are hostile, clients that leave while one compiles, tools that make no sense, and mixed batches."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import Counter
from copy import deepcopy
from typing import Any

import numpy as np

from serve_faults_parts.clients import _posted
from serve_faults_parts.stage import PROMPTS, Row, Stage, attempt, expect, together

RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"type": "integer", "maximum": 999}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
#: Each is refused, or answered; what it costs is bounded.
HOSTILE: dict[str, Any] = {
    "a schema 600 levels deep": None,
    "60,000 values": {"json": {"enum": [f"value {i}" for i in range(6000)]}},
    "3,000 optional properties": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
    "a regex of repeats of repeats": {"regex": "((a{1,100}){1,100}){1,100}"},
    "a regex with stars in stars": {"regex": "(a+)+(b|bb|bbb)*(.*a){20}"},
    "a schema that never ends": {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    "1 MB of a regex": {"regex": "a" * 2**20},
    "no grammar": {"grammar": "start: ("},
}
HARMLESS = {"regex": "[a-z]+"}


def _hostile() -> list[Any]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"anyOf": [deep]}
    return [{"json": deep} if grammar is None else grammar for grammar in HOSTILE.values()]


def hostile_grammars(stage: Stage) -> Row:
    """While others are answered, whose time is compared with that beside as many answers to a harmless grammar."""
    grammars, number = _hostile(), stage.count(64, 8)
    told, took, whole = _beside_others(stage, [grammars[i % len(grammars)] for i in range(number)])
    expect(told["refused"] and not told["error"], f"hostile grammars were {dict(told)}")
    state = f"{stage.same(whole)}; {stage.answers_right()}"
    _, usual, _ = _beside_others(stage, [HARMLESS] * told["answered"])
    stage.quiet()
    return Row(
        f"{number} hostile grammars (deep, huge, endless, catastrophic regexes, 1 MB) beside {len(PROMPTS)} requests",
        f"{told['refused']} refused in a sentence, {told['answered']} answered; the others took {took / usual:.1f} "
        f"times as long as beside {told['answered']} harmless ones; {state}",
        "nothing",
    )


def _beside_others(stage: Stage, grammars: list[Any]) -> tuple[Counter[str], float, Any]:
    """Ask for a few tokens under each, while others are answered: what became of them, the others' time and texts."""

    def ask(i: int) -> str:
        asked = stage.ask(PROMPTS[i % len(PROMPTS)], 8, structured=json.dumps(grammars[i]))
        answer = attempt(stage.server, asked)
        return "refused" if "structured" in str(answer.get("error")) else "error" if "error" in answer else "answered"

    begin = time.monotonic()
    crowd = stage.crowd(len(PROMPTS))
    told = Counter(together(len(grammars), 4, ask))
    whole, errors = crowd.ended()
    expect(not errors and len(whole) == len(PROMPTS), f"others failed: {dict(errors)}")
    return told, time.monotonic() - begin, whole


def gone_while_compiling(stage: Stage) -> Row:
    number = stage.count(100, 8)

    def leave(i: int) -> None:
        schema = {"enum": [f"{i} {word}" for word in range(3000)]}  # compiled anew: no other has asked for it
        body = stage.ask(PROMPTS[i % 4], 1024, structured=json.dumps({"json": schema}), stream=True)
        with contextlib.suppress(OSError), _posted(stage, False, body) as connection:
            time.sleep(0.002 * (i % 10))
            connection.shutdown(socket.SHUT_RDWR)

    together(number, 4, leave)
    state = stage.answers_right()
    stage.quiet()
    return Row(f"{number} clients gone while their grammars compile", state, "nothing")


def fuzzed_tools(stage: Stage) -> Row:
    """Requests for tools with a part changed at random; the gateway answers each, and never with 500."""
    number, draw = stage.count(1000, 40), np.random.default_rng(0)
    bodies = [json.dumps(_changed(deepcopy(_tool_request()), draw)).encode() for _ in range(number)]
    told = Counter(together(number, 8, lambda i: stage.gateway(bodies[i])[0]))
    expect(set(told) <= {200, 400, 404, 413, 429}, f"the gateway said {dict(told)}")
    state = stage.answers_right()
    stage.quiet()
    said = ", ".join(f"{status} to {count}" for status, count in sorted(told.items()))
    return Row(f"{number} requests for tools, changed at random", f"{said}; {state}", "nothing")


def _tool_request() -> dict[str, Any]:
    function = {"name": "record", "description": "writes", "parameters": RECORD, "strict": True}
    call = {"id": "call_1", "type": "function", "function": {"name": "record", "arguments": '{"name": "a", "size": 1}'}}
    return {
        "model": "echo",
        "messages": [
            {"role": "user", "content": "write it"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "done"},
            {"role": "user", "content": "and again"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": RECORD, "strict": True}},
        "max_tokens": 4,
    }


_ODD: tuple[Any, ...] = (None, "", "x" * 300, -1, 1e300, True, [], {}, [[]], {"type": "x"}, "\ud800", {"$ref": "#"})


def _changed(value: Any, draw: np.random.Generator) -> Any:
    """The request with one to four of its parts left out, doubled or put in the place of something odd."""
    for _ in range(int(draw.integers(1, 5))):
        part = value
        while True:
            keys = list(part) if isinstance(part, dict) else range(len(part))
            key = keys[int(draw.integers(len(keys)))]
            inner = part[key]
            if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
                break
            part = inner
        action = int(draw.integers(3))
        if action == 0 and isinstance(part, dict) and len(part) > 1:
            del part[key]
        elif action == 1 and isinstance(part, list):
            part.append(deepcopy(inner))
        else:
            part[key] = deepcopy(_ODD[int(draw.integers(len(_ODD)))])
    return value


def mixed_batches(stage: Stage) -> Row:
    """Requests under grammars and without, at once."""
    number = 2 * stage.batch
    free = stage.crowd(number // 2)
    asked = json.dumps({"json": RECORD})
    answers = together(number // 2, number // 2, lambda i: attempt(stage.server, _record(stage, i, asked)))
    whole, errors = free.ended()
    expect(not errors, f"errors: {dict(errors)}")
    expect(all("finish_reason" in answer for answer in answers), f"under a schema: {answers}"[:300])
    ended = [answer["text_output"] for answer in answers if answer["finish_reason"] == "stop"]
    for text in ended:
        record = json.loads(text)
        expect(
            isinstance(record, dict) and record.keys() == {"name", "size"} and record["size"] <= 999,
            f"a record is {record}",
        )
    told = f"{len(ended)} records ended, and fit; {stage.same(whole)}; {stage.answers_right()}"
    stage.quiet()
    return Row(f"{number} requests at once, half of them under a schema", told, "nothing")


def _record(stage: Stage, i: int, structured: str) -> dict[str, Any]:
    return stage.ask(PROMPTS[i % 4], 64, structured=structured)
