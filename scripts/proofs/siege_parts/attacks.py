"""What a single client does to a server, in seconds and on loopback alone; each attack goes on until it is stopped."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

CHUNK = b"10000\r\n" + b"x" * 65536 + b"\r\n"
GIANT = 2**26  # bytes of a body, where nobody ends it before
AMBIGUOUS = 'start: s\ns: s s s | s s | "a"'


@dataclass(frozen=True)
class Target:
    """A server under attack. ``stop``: set at the end; ``connections``: what its door takes at once."""

    port: int
    key: str
    process: psutil.Process
    connections: int
    stop: threading.Event

    def connect(self, unread: bool = False) -> socket.socket:
        connection = socket.socket()
        if unread:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def head(self, method: str, path: str, key: str, *lines: str) -> bytes:
        lines = (f"Host: 127.0.0.1:{self.port}", f"Authorization: Bearer {key}", *lines)
        return "\r\n".join((f"{method} {path} HTTP/1.1", *lines, "", "")).encode()

    def post(self, **body: Any) -> bytes:
        given = {"model": "echo", "messages": [{"role": "user", "content": "Tell a story."}], **body}
        content = json.dumps(given).encode()
        kind, length = "Content-Type: application/json", f"Content-Length: {len(content)}"
        return self.head("POST", "/v1/chat/completions", self.key, kind, length) + content

    def ask(self, **body: Any) -> None:
        """Ask for a chat's answer and read it; a refusal is answered by a pause, as a client does that goes on."""
        with suppress(OSError, http.client.HTTPException), self.connect() as connection:
            connection.settimeout(60)
            connection.sendall(self.post(**body))
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            reply.read()
            self.stop.wait(0 if reply.status == 200 else 0.2)

    def again(self, count: int, work: Callable[[], object]) -> None:
        """Do the work in ``count`` threads until the end."""

        def go_on() -> None:
            while not self.stop.is_set():
                try:
                    work()
                except OSError:
                    self.stop.wait(0.05)

        threads = [threading.Thread(target=go_on, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def child(self, module: str) -> psutil.Process | None:
        """Return the running process of a module, which the supervisor starts."""
        with suppress(psutil.Error):
            return next((each for each in self.process.children(True) if module in each.cmdline()), None)
        return None


def kept_connections(target: Target) -> None:
    """Keep more connections than there are places, ask on each now and then, and read every answer."""

    async def one() -> None:
        while not target.stop.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
                while not target.stop.is_set():
                    writer.write(target.head("GET", "/version", "none"))
                    await reader.readuntil(b"}")
                    await asyncio.sleep(2)
                writer.close()
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.5)

    async def crowd() -> None:
        await asyncio.gather(*(one() for _ in range(target.connections + 24)))

    asyncio.run(crowd())


def _unread(target: Target, request: bytes, count: int) -> None:
    """Hold connections on which requests are sent and no answer is read; renew those that are closed."""
    held: list[socket.socket] = []
    while not target.stop.wait(0.5):
        with suppress(OSError):
            held = [each for each in held if not _closed(each)]
            while len(held) < count and not target.stop.is_set():
                connection = target.connect(unread=True)
                held.append(connection)
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    connection.send(request)
    for connection in held:
        connection.close()


def _closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def unread_metrics(target: Target) -> None:
    _unread(target, target.head("GET", "/metrics", "none") * 60, target.connections + 5)


def unread_schema(target: Target) -> None:
    _unread(target, target.head("GET", "/openapi.json", "none") * 60, target.connections + 5)


def unread_streams(target: Target) -> None:
    body = {"stream": True, "max_tokens": 200, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    _unread(target, target.post(**body), 4)


def _upload(target: Target, path: str, key: str, chunks: Iterable[bytes]) -> None:
    with target.connect() as connection:
        kinds = ("Content-Type: application/json", "Transfer-Encoding: chunked")
        connection.sendall(target.head("POST", path, key, *kinds))
        for chunk in chunks:
            if target.stop.is_set():
                return
            connection.sendall(chunk)


def wrong_key_uploads(target: Target) -> None:
    small = [b"1\r\nx\r\n" * 4096] * (GIANT // 24576)
    target.again(8, lambda: _upload(target, "/v1/chat/completions", "a wrong key", small))


def chunked_giants(target: Target) -> None:
    target.again(2, lambda: _upload(target, "/v1/chat/completions", target.key, [CHUNK] * (GIANT // 65536)))


def scrapes(target: Target) -> None:
    def scrape() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=30)
        with suppress(http.client.HTTPException):
            connection.request("GET", "/metrics")
            connection.getresponse().read()
        connection.close()

    target.again(8, scrape)


def ambiguous_grammars(target: Target) -> None:
    target.again(2, lambda: target.ask(max_tokens=1500, structured_outputs={"grammar": AMBIGUOUS}))


def flood(target: Target) -> None:
    target.again(100, lambda: target.ask(n=3, max_tokens=40, ignore_eos=True))


def many_choices(target: Target) -> None:
    target.again(2, lambda: target.ask(n=110, max_tokens=40, ignore_eos=True))


def long_prompts(target: Target) -> None:
    """Ask with one long prompt after the other, none of which the prefix cache knows."""
    words = (f"{i} the cat sat " for i in range(10**6))
    target.again(1, lambda: target.ask(messages=[{"role": "user", "content": next(words) * 1200}], max_tokens=2))


def tiny_targets(target: Target) -> None:
    milliseconds = iter((1e-310, 1e-3) * 10**6)
    target.again(4, lambda: target.ask(max_tokens=50, ignore_eos=True, latency={"tpot_ms": next(milliseconds)}))


def logprobs_together(target: Target) -> None:
    body = {"n": 16, "logprobs": True, "top_logprobs": 20, "deadline_ms": 4000, "temperature": 1.0}
    target.again(2, lambda: target.ask(max_tokens=590, ignore_eos=True, **body))


def _kill(target: Target, module: str) -> None:
    target.stop.wait(1)
    if process := target.child(module):
        process.kill()


def engine_killed(target: Target) -> None:
    _kill(target, "echo_trt.engine.process")


def door_killed(target: Target) -> None:
    _kill(target, "echo_trt.server")


ATTACKS: dict[str, Callable[[Target], None]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        kept_connections,
        unread_metrics,
        unread_schema,
        unread_streams,
        wrong_key_uploads,
        chunked_giants,
        scrapes,
        ambiguous_grammars,
        flood,
        many_choices,
        long_prompts,
        tiny_targets,
        logprobs_together,
        engine_killed,
        door_killed,
    )
}
KILLS = ("engine-killed", "door-killed")
