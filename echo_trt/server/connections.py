"""How many connections may be open, and how long a request may take to arrive and its answer to be read: uvicorn itself
limits none of these.
"""

from __future__ import annotations

import asyncio
import fcntl
import resource
import struct
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from echo_trt.server.errors import full

MAX_CONNECTIONS = 4096  # open connections; an idle one takes some 10 KB
#: Bytes read at once. In a chunked body every byte may be a chunk, which takes 15 us of the event loop: with asyncio's
#: own 256 KB other clients would wait 0.6 s for each such client, with this 3 ms. A plain body of a megabyte takes
#: 43 ms in all instead of 5. It also makes h11's limit of 16 KB for a request's head hold.
READ = 1024
#: Seconds between two looks at whether a client that has ended its side of the connection is still there.
LOOK_S = 0.25
ARRIVAL_S = 30.0  # from a connection's beginning, or a later request's first byte, until the request is complete
UNREAD_S = 60.0  # that a client may take no byte of its answer
STALLED_S = 1.0  # after which a connection on which nothing moves may be closed for a newer one
LINGER, LINGER_S = 2**20, 1.0  # bytes and seconds of the rest of a refused request, which is thrown away

IDLE, ARRIVING, ANSWERED, UNREAD, CLOSING = STATES = "idle", "arriving", "answered", "unread", "closing"
#: Which connection is closed for a new one: the longest in the first of these states, if it is so for these seconds.
CLOSED_FIRST = ((IDLE, 0.0), (UNREAD, STALLED_S), (ARRIVING, STALLED_S), (UNREAD, 0.0), (ARRIVING, 0.0))


def max_connections() -> int:
    """Raise this process's limit of descriptors as far as it may, and say how many connections leave room below it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, hard // 2)


class ConnectionSlots:
    """The connections of a server, ``limit`` at most beside those that close; in each state the longest one first.

    A sixteenth of them is kept for requests with a valid key, and for probes.
    """

    def __init__(self, limit: int):
        self.limit, self._kept = limit, max(limit // 16, 1)
        self._since: dict[str, dict[HttpConnection, float]] = {state: {} for state in STATES}

    def __len__(self) -> int:
        return sum(map(len, self._since.values()))

    def move(self, connection: HttpConnection, state: str | None) -> None:
        """Note that a connection is in another state; None: it is closed."""
        if connection.state:
            self._since[connection.state].pop(connection, None)
        if state:
            self._since[state][connection] = time.monotonic()
        if len(self._since[CLOSING]) > self._kept:
            next(iter(self._since[CLOSING])).abort()

    def make_room(self) -> None:
        """Close a connection if a new one is beyond the limit: the new one itself where all others are answered."""
        if len(self) - len(self._since[CLOSING]) > self.limit and (found := self._longest(*CLOSED_FIRST)):
            found.leave()

    def full(self) -> bool:
        """Whether a request may be answered only if a place is kept for it. One with an unread answer gives way."""
        if len(self._since[ANSWERED]) + len(self._since[UNREAD]) <= self.limit - self._kept:
            return False
        stalled = self._longest((UNREAD, STALLED_S))
        if stalled:
            stalled.leave()
        return not stalled

    def _longest(self, *order: tuple[str, float]) -> HttpConnection | None:
        now = time.monotonic()
        for state, seconds in order:
            for connection, since in self._since[state].items():
                if now - since >= seconds:
                    return connection
                break
        return None


class HttpConnection(H11Protocol):
    """Has a place, and gives it up where its request does not arrive in time, or no byte of its answer is taken.

    ``arrival``: seconds from the connection's beginning, or a later request's first byte. (uvicorn's own timeout is for
    the time between an answer and the next request.) ``unread``: seconds in which a client must take some of an answer.
    """

    def __init__(
        self, *args: Any, slots: ConnectionSlots, arrival: float = ARRIVAL_S, unread: float = UNREAD_S, **more: Any
    ):
        super().__init__(*args, **more)
        self._application, self.app = self.app, self._respond
        self._slots = slots
        self.state: str | None = None
        self._seconds = {ARRIVING: arrival, UNREAD: unread, CLOSING: LINGER_S}
        self._timer: asyncio.TimerHandle | None = None  # of the state
        self._look: asyncio.TimerHandle | None = None
        self._unread = self._rest = 0  # bytes of an answer at the last look; that may be thrown away while it closes

    # -- what happens to it --------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:  # a selector's: no public type has its max_size
        self._selector, transport.max_size = transport, READ
        transport.set_write_buffer_limits(0)  # paused is what has unread bytes
        super().connection_made(_Transport(transport, self._close))  # type: ignore[arg-type]
        self._enter(ARRIVING)
        self._slots.make_room()

    def data_received(self, data: bytes) -> None:
        if self.state == CLOSING:
            self._rest -= len(data)
            return self.abort() if self._rest < 0 else None
        super().data_received(data)
        self._settle(ARRIVING)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle(IDLE)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._settle(UNREAD)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._settle(ARRIVING)

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

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look:
            self._look.cancel()
        self._enter(None)
        super().connection_lost(exc)

    def _look_for_client(self) -> None:
        if self.conn.our_state is h11.SEND_RESPONSE:  # later the answer's own text tells
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim))
            self._look = self.loop.call_later(LOOK_S, self._look_for_client)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; an answer before the end of its request is the connection's last."""
        cycle = self.cycle

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and cycle.more_body:
                headers = [header for header in message.get("headers", ()) if header != CLOSE_HEADER]
                message = {**message, "headers": [*headers, CLOSE_HEADER]}
            await send(message)

        scope["full"] = self._slots.full()
        await self._application(scope, receive, send_last)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, which no handler sees, with a line of the log."""
        super().send_400_response(msg)
        self._tell({"status": 400, "error": msg})

    def _tell(self, fields: dict[str, Any]) -> None:
        """Write a line of the log of what was refused here (``request_log.RequestLines``)."""
        if lines := getattr(getattr(self.config.app, "state", None), "lines", None):
            lines.write(fields)

    # -- its state -----------------------------------------------------------------------------------------------------

    def _settle(self, waiting: str) -> None:
        """Enter the state that the connection is in; ``waiting``: where no request is open."""
        if self.flow.write_paused and self.state != CLOSING:
            self._enter(UNREAD)
        elif not self._selector.is_closing() and self.state != CLOSING:
            states = {h11.IDLE: waiting, h11.SEND_BODY: ARRIVING}
            self._enter(states.get(self.conn.their_state, ANSWERED))

    def _enter(self, state: str | None) -> None:
        if state == self.state:
            return
        if self._timer:
            self._timer.cancel()
        self._slots.move(self, state)
        self.state, seconds = state, self._seconds.get(state or "")
        self._unread = self._left() if state == UNREAD else 0
        self._timer = self.loop.call_later(seconds, self._end) if seconds else None

    def _end(self) -> None:
        """Abort the connection in whose state the time is over, unless its client has taken a part of its answer."""
        if self.state == UNREAD and (left := self._left()) < self._unread:
            self._unread, self._timer = left, self.loop.call_later(self._seconds[UNREAD], self._end)
        else:
            self.abort()

    def _left(self) -> int:
        """Return how many bytes of an answer the client has not taken, here and in the system."""
        queued = fcntl.ioctl(self._selector.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int(self._selector.get_write_buffer_size() + struct.unpack("i", queued)[0])

    # -- its end -------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Give up its place to another. A client whose request has not come is told so."""
        if self.state == IDLE:
            self.timeout_keep_alive_handler()
            self._enter(None)
        elif self.state == ARRIVING and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if self.cycle:  # it waits for the body
                self.scope["failed"] = 503  # type: ignore[typeddict-unknown-key]  # as which it is counted (``edge``)
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            refusal = full().response({"path": ""})
            self._tell({"status": refusal.status_code, "error": full().detail})
            head = "".join(f"{name}: {value}\r\n" for name, value in refusal.headers.items())
            self._selector.write(f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n".encode() + bytes(refusal.body))
            self._linger()
        else:
            self.abort()

    def abort(self) -> None:
        self._enter(None)
        self._selector.abort()

    def _close(self) -> None:
        if self.conn.their_state in (h11.SEND_BODY, h11.ERROR) and not self._selector.is_closing():
            self._linger()
        else:
            self._selector.close()

    def _linger(self) -> None:
        """Close our side, and throw away what still comes: closed at once, the client could lose its answer."""
        if self.state != CLOSING:
            self._rest, self._selector.max_size = LINGER, 2**16
            self._enter(CLOSING)
            with suppress(OSError):  # the client has left
                self._selector.write_eof()
            self.flow.resume_reading()


class _Transport:
    """A transport that is closed by ``close``."""

    def __init__(self, transport: Any, close: Callable[[], None]):
        self._transport, self.close = transport, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
