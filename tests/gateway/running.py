"""The gateway as users meet it: uvicorn on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette


@contextmanager
def running(app: Starlette, **options: Any) -> Iterator[httpx.Client]:
    """A client of the app, for as long as the block lasts. ``options`` are uvicorn's."""
    options |= {"loop": "asyncio", "log_config": None, "access_log": False, "timeout_graceful_shutdown": 5}
    config = uvicorn.Config(app, port=0, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            assert time.monotonic() < end, "the gateway does not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the gateway does not stop"


def refused(response, status: int, param: str | None = None) -> str:
    """The sentence of an answer that must be an error in OpenAI's format."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].endswith(".")
    return error["message"]
