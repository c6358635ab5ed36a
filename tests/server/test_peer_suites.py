"""Requests of other servers' test suites (peers.yaml): each is answered as its row says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from server.running import engine_of, running

PAGE = "http://web.mydomain.fr"
SUITES = yaml.safe_load(Path(__file__).with_name("peers.yaml").read_text())
ROWS = [
    pytest.param({"path": "/v1/chat/completions", **suite, **row}, id=f"{Path(suite['suite']).stem}-{row['test']}")
    for suite in SUITES
    for row in suite["rows"]
]


@pytest.fixture(scope="module")
def doors(tool_bundle, keys) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Return clients of two doors of one engine; the second one asks for a key, and answers a page."""
    asked = {"api_keys_file": keys, "origins": [PAGE]}
    with engine_of(tool_bundle("llama3")) as engine, running(engine) as door, running(engine, **asked) as other:
        yield door, other


@pytest.mark.parametrize("row", ROWS)
def test_a_peer_s_request_is_answered_as_its_row_says(row, doors):
    client, body = doors[row.get("keys", False)], dict(row.get("body", {}))
    if times := body.pop("repeat", 0):
        body |= {"prompt": body["prompt"] * times} if "prompt" in body else {"messages": body["messages"] * times}
    content = row.get("raw", json.dumps(body)) if row.get("method", "POST") == "POST" else None
    headers = {"content-type": "application/json", **row.get("send", {})}
    answer = client.request(row.get("method", "POST"), row["path"], content=content, headers=headers)
    assert answer.status_code == row.get("status", 200), answer.text
    for name, wanted in row.get("headers", {}).items():
        assert fits(answer.headers.get(name), wanted), (name, answer.headers.get(name))
    found = parsed(answer)
    for field, wanted in row.get("fields", {}).items():
        assert fits(at(found, field), wanted), (field, at(found, field), answer.text)
    if "streamed" in row:
        events = parsed(client.post(row["path"], json=body | {"stream": True}))["events"]
        first, *rest = [part for event in events if (part := at(event, row["streamed"])) is not None]
        for part in rest:
            first = first + part
        assert first == at(found, row["streamed"])


def parsed(answer: httpx.Response) -> Any:
    """Return a JSON answer, the events of a stream, or nothing of another one."""
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        return {"events": [json.loads(x) for x in lines if x != "[DONE]"], "done": lines[-1] == "[DONE]"}
    return answer.json() if answer.headers.get("content-type") == "application/json" else {}


def at(found: Any, field: str) -> Any:
    """Return a field, by names and positions with dots between; None where it is missing."""
    for name in field.split("."):
        if isinstance(found, list) and re.fullmatch(r"-?\d+", name):
            found = found[int(name)] if -len(found) <= int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


def fits(value: Any, wanted: Any) -> bool:
    """Compare a value with what a row says of it."""
    if wanted == "+":
        return bool(value)
    if isinstance(wanted, str) and wanted[:1] == "~":
        return value is not None and re.search(wanted[1:], str(value), re.DOTALL) is not None
    if isinstance(wanted, str) and wanted[:1] == "#":
        return value is not None and len(value) == int(wanted[1:])
    return bool(value == wanted)
