"""How many connections may be open, and how long a request may take to arrive: uvicorn itself limits neither."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 4096  # open connections; an idle one takes some 10 KB
#: Bytes read at once. In a chunked body every byte may be a chunk, which takes 15 us of the event loop: with asyncio's
#: own 256 KB other clients would wait 0.6 s for each such client, with this 3 ms. A plain body of a megabyte takes
#: 43 ms in all instead of 5. It also makes h11's limit of 16 KB for a request's head hold.
READ = 1024
#: Seconds between two looks at whether a client that has ended its side of the connection is still there.
LOOK_S = 0.25
ARRIVAL_S = 30.0  # from a connection's beginning, or a later request's first byte, until the request is complete


def max_connections() -> int:
    """Raise this process's limit of descriptors as far as it may, and say how many connections leave room below it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, hard // 2)


class HttpConnection(H11Protocol):
    """Close a connection whose request does not arrive in time. At the limit of ``limit`` connections close the one
    that has waited longest for its request, or the newest if none waits. So silent clients lock nobody out.

    ``seconds``: from the connection's beginning, or a later request's first byte. (uvicorn's own timeout is for the
    time between an answer and the next request.)
    """

    def __init__(self, *args: Any, limit: int, seconds: float = ARRIVAL_S, **more: Any):
        super().__init__(*args, **more)
        self._max_connections, self._seconds = limit, seconds
        self._late: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # a selector's: no public type has its max_size
        super().connection_made(transport)
        transport.max_size = READ
        if len(self.connections) > self._max_connections:
            others = (other for other in self.connections if isinstance(other, HttpConnection))
            owing = {other: other._late.when() for other in others if other._late}
            min(owing, key=owing.__getitem__, default=self)._abort()
        if not transport.is_closing():
            self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_request()
        else:
            self._request_came()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's never keeps a connection
        """Answer a client that has ended its side after a request, as ``nc -N`` does: true keeps the connection.

        One that has left sends the same. Writing tells them apart, for the system of the latter refuses it, so an
        interim response is sent now and then, which clients of HTTP/1.1 skip.
        """
        waits = self.conn.their_state is h11.DONE and self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY)
        if not waits or self.conn.their_http_version != b"1.1":
            return False
        self.cycle.keep_alive = False
        self._look_for_client()
        return True

    def _look_for_client(self) -> None:
        if self.conn.our_state is h11.SEND_RESPONSE:  # later the answer's own text tells
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim))
            self._look = self.loop.call_later(LOOK_S, self._look_for_client)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look:
            self._look.cancel()
        self._request_came()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, which no handler sees, with a line of the log."""
        super().send_400_response(msg)
        self._tell({"status": 400, "error": msg})

    def _tell(self, fields: dict[str, Any]) -> None:
        """Write a line of the log of what was refused here (``request_log.RequestLines``)."""
        if lines := getattr(getattr(self.config.app, "state", None), "lines", None):
            lines.write(fields)

    def _await_request(self) -> None:
        self._late = self._late or self.loop.call_later(self._seconds, self._abort)

    def _abort(self) -> None:
        self._request_came()  # it is not to be chosen again before it is lost
        self.transport.abort()

    def _request_came(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = None
