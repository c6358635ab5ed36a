"""The engine's figures, fetched from Triton's endpoint for those who ask the gateway alone."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from http.client import HTTPException

from echo_trt.errors import UserError

WAIT_S = 1.0  # for all of the answer
LARGEST = 2**24  # bytes of it
_OURS = re.compile(rb"^(?:# (?:HELP|TYPE) )?echo_(?!gateway_).*\n?", re.MULTILINE)
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # whatever http_proxy says


class EngineMetrics:
    """Of the endpoint at ``url``. Made and used within one event loop."""

    def __init__(self, url: str):
        """Raises UserError."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--metrics-url is {url[:200]!a}; give Triton's, such as http://localhost:8002/metrics.")
        self._url = url
        self._fetch: asyncio.Task[bytes | None] | None = None

    async def text(self) -> bytes | None:
        """The series ``echo_*`` in Prometheus' text format; None where they did not come in time.

        Whoever asks while they are fetched waits for the same, so there is one thread however many ask.
        """
        if self._fetch is None or self._fetch.done():
            self._fetch = asyncio.create_task(asyncio.to_thread(_fetched, self._url))
        try:
            return await asyncio.wait_for(asyncio.shield(self._fetch), WAIT_S)
        except TimeoutError:
            return None


def _fetched(url: str) -> bytes | None:
    end, parts, size = time.monotonic() + WAIT_S, [], 0
    try:
        with _open(url, timeout=WAIT_S) as reply:
            while part := reply.read1(65536):
                parts.append(part)
                size += len(part)
                if size > LARGEST or time.monotonic() > end:
                    return None
    except (OSError, ValueError, HTTPException):  # the second: no URL after all
        return None
    return b"".join(_OURS.findall(b"".join(parts)))
