"""Clients of OpenAI's API: one answer, and many streams of which none may be cut or refused."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .engine import Missed, until

PATIENCE = 240  # seconds for the next piece of an answer
PAUSE = 0.5  # seconds of a client between two answers
CHAT = "/v1/chat/completions"
QUESTION = "Write a long list of things that one can see in a harbour, with a sentence about each."


def body(tokens: int, **more) -> dict:
    return {"model": "echo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens} | more


@contextmanager
def asked(port: int, path: str, content: dict | None, key: str) -> Iterator[http.client.HTTPResponse]:
    """Send a request, a GET without ``content``; yield the reply before its body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request("POST" if content else "GET", path, json.dumps(content) if content else None, headers)
        yield connection.getresponse()
    finally:
        connection.close()


def ask(port: int, path: str = CHAT, content: dict | None = None, key: str = "") -> tuple[int, str]:
    """Return a reply's status and text; 0 and the error where nobody answers."""
    try:
        with asked(port, path, content, key) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{type(error).__name__}: {error}"


def serves(port: int, path: str = "/health", content: dict | None = None, key: str = "") -> bool:
    return ask(port, path, content, key)[0] == 200


def answer(port: int, tokens: int = 16) -> None:
    """Raise Missed if there is no answer."""
    status, text = ask(port, content=body(tokens))
    if status != 200 or not json.loads(text)["choices"][0]["message"]["content"]:
        raise Missed(f"no answer but {status}: {text[:300]}")


@dataclass
class Streams:
    """``count`` clients with one stream after the other until the end, or ``once``; what became of their answers.

    pieces   that came by themselves, of the answer that had the most
    waiting  clients that have not had the first piece of their first answer
    """

    port: int
    count: int = 32
    tokens: int = 48
    key: str = ""
    once: bool = False
    whole: int = 0
    pieces: int = 0
    trouble: list[str] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)

    def __enter__(self) -> Streams:
        self._ended, self._lock, self.waiting = threading.Event(), threading.Lock(), set(range(self.count))
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def flowing(self) -> None:
        """Wait until every client has had its first piece."""
        until(lambda: not self.waiting or self.trouble, PATIENCE, "all streams flow")
        self.check()

    def more(self, answers: int) -> None:
        """Wait until so many more answers are whole."""
        wanted = self.whole + answers
        until(lambda: self.whole >= wanted or self.trouble, PATIENCE, f"{answers} more answers")
        self.check()

    def check(self) -> str:
        """Return what was seen; raise Missed if an answer was cut or refused."""
        if self.trouble:
            raise Missed(f"{len(self.trouble)} of {self.whole + len(self.trouble)} answers: {self.trouble[0]}")
        return f"{self.whole} streams whole"

    def _run(self, number: int) -> None:
        while True:
            reads, last, status = 0, b"", 0
            try:
                content = body(self.tokens, stream=True, ignore_eos=True)
                with asked(self.port, CHAT, content, self.key) as reply:
                    status = reply.status
                    while piece := reply.read1(65536):
                        self.waiting.discard(number)
                        reads, last = reads + 1, last[-2000:] + piece
            except (OSError, http.client.HTTPException) as error:
                last = f"{type(error).__name__}: {error}".encode()
            with self._lock:
                if status == 200 and b"[DONE]" in last and b'"error"' not in last:
                    self.whole, self.pieces = self.whole + 1, max(self.pieces, reads)
                else:
                    self.trouble.append(f"status {status}, ended after {reads} pieces: {last[-300:].decode()}")
            if self.once or self._ended.wait(PAUSE):
                return
