"""The live page in a real Chromium: what its tests do with it."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from typing import Any

import pytest
from engine.service.served import Served
from server.running import client_of
from waiting import wait_until

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
needs_page = [
    pytest.mark.skipif(not find_spec("playwright"), reason="needs playwright: pip install playwright"),
    pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium, or its path in CHROMIUM"),
]
PROMPT = "the theme of a thing"
SECONDS = 60_000  # milliseconds, for what takes a moment on a quiet machine
#: A schema that makes any model write for a while.
LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 400}
LIVE = '#state[data-state="live"]'


def origin(server: Served) -> str:
    return f"http://127.0.0.1:{server.openai}/"


def until(page: Any, true: str) -> None:
    """Wait for an expression to be true. Playwright's own way is an eval in the page, which its policy forbids."""
    wait_until(lambda: page.evaluate(true) or page.wait_for_timeout(50), reported=lambda: true)


def ask(page: Any, text: str = PROMPT, **settings: str) -> None:
    """Send a message; ``settings`` by the ids of their fields."""
    for name, value in settings.items():
        page.evaluate("([id, value]) => { document.getElementById(id).value = value }", [name, value])
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Any, answers: int = 1) -> None:
    until(page, f"document.querySelectorAll('.answer[data-ended]').length === {answers}")
    until(page, "document.querySelector('#stop').disabled")


def answer_of(server: Served, **body: Any) -> dict[str, Any]:
    body = {"model": "echo", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, **body}
    with client_of(server) as client:
        return client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]


def chunk(**choice: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, **choice}]})}\n\n"


def hide_and_show(page: Any) -> None:
    """Let the page look away and back again, so that it asks for snapshots anew."""
    page.evaluate(
        """for (const hidden of [true, false]) {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
