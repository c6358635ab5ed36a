"""Loaded by Schemathesis: bounds answers, so that a run takes minutes, and reads streams."""

from __future__ import annotations

import json
from typing import Any

import schemathesis

#: Of an answer, and of choices; larger: a run takes longer, and sees nothing more.
TOKENS, CHOICES = 16, 2
DEADLINE_MS = 600_000  # an earlier one ends answers with 504, as it should
#: Path -> its fields of the limit. One that is missing is written, but for Anthropic's, which is required.
LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
    "/api/chat": ("num_predict",),
    "/api/generate": ("num_predict",),
}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Change limits that are valid. What is wrong in a body stays wrong."""
    path, body = case.operation.path, case.body
    if not isinstance(body, dict):
        return
    if type(body.get("n")) is int:
        body["n"] = min(body["n"], CHOICES)
    if type(body.get("deadline_ms")) is int and body["deadline_ms"] > 0:
        body["deadline_ms"] = max(body["deadline_ms"], DEADLINE_MS)
    options = body.setdefault("options", {}) if path in ("/api/chat", "/api/generate") else body
    for name in LIMITS.get(path, ()) if isinstance(options, dict) else ():
        limit = options.get(name)
        if (limit is None and path != "/v1/messages") or (type(limit) is int and limit > TOKENS):
            options[name] = TOKENS


@schemathesis.deserializer("text/event-stream")
def events(context: schemathesis.DeserializationContext, response: schemathesis.Response) -> list[Any]:
    """Return the events, each of which is compared with the schema."""
    lines = [line[6:] for line in response.content.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@schemathesis.deserializer("application/x-ndjson")
def last_line(context: schemathesis.DeserializationContext, response: schemathesis.Response) -> Any:
    """Return the last line: these are compared with the schema one by one, and Schemathesis takes one answer."""
    return json.loads(response.content.decode().splitlines()[-1])
