"""Clients of OpenAI's API: one answer, and many streams of which none may be cut or refused."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field

from .engine import Missed, until

PATIENCE = 120  # seconds for the next piece of an answer
CHAT = "/v1/chat/completions"
QUESTION = "Write a long list of things that one can see in a harbour, with a sentence about each."


def body(tokens: int, **more) -> dict:
    return {"model": "echo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens} | more


def ask(port: int, path: str = CHAT, content: dict | None = None, key: str = "", host: str = "127.0.0.1"):
    """Return (status, headers, text) of a request: a GET without ``content``; (0, {}, error) if nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request("POST" if content else "GET", path, json.dumps(content) if content else None, headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, {}, f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def serves(port: int, path: str = "/health", **more) -> bool:
    return ask(port, path, **more)[0] == 200


def answer(port: int, tokens: int = 16, **more) -> str:
    """Return the text of one answer; raise Missed if there is none."""
    status, _, text = ask(port, content=body(tokens), **more)
    if status != 200 or not (said := json.loads(text)["choices"][0]["message"]["content"]):
        raise Missed(f"no answer but {status}: {text[:300]}")
    return said


@dataclass
class Streams:
    """``count`` clients, each with one stream after the other until ``stop``; what became of their answers."""

    port: int
    count: int = 32
    tokens: int = 48
    key: str = ""
    once: bool = False
    whole: int = 0
    pieces: int = 0  # that came by themselves, of the answer that had the fewest
    trouble: list[str] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)  # clients without the first piece of their first answer

    def __enter__(self) -> Streams:
        self._ended, self._lock = threading.Event(), threading.Lock()
        self.waiting = set(range(self.count))
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
        until(lambda: self.whole >= wanted or self.trouble, 2 * PATIENCE, f"{answers} more answers")
        self.check()

    def check(self) -> str:
        """Return what was seen; raise Missed if an answer was cut or refused."""
        if self.trouble:
            raise Missed(f"{len(self.trouble)} of {self.whole + len(self.trouble)} answers: {self.trouble[0]}")
        return f"{self.whole} streams whole"

    def _run(self, number: int) -> None:
        while True:
            self._stream(number)
            self.waiting.discard(number)
            if self.once or self._ended.wait(0.5):
                return

    def _stream(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        told, begin, reads, last, status = b"", time.monotonic(), 0, b"", None
        try:
            content = body(self.tokens, stream=True, ignore_eos=True)
            connection.request("POST", CHAT, json.dumps(content), headers)
            reply = connection.getresponse()
            status = reply.status
            while piece := reply.read1(65536):
                self.waiting.discard(number)
                reads, last = reads + 1, last[-2000:] + piece
            if status == 200 and b"[DONE]" in last and b'"error"' not in last:
                with self._lock:
                    self.pieces = min(self.pieces or reads, reads)
                    self.whole += 1
                return
            told = last
        except (OSError, http.client.HTTPException) as error:
            told = f"{type(error).__name__}: {error}".encode()
        finally:
            connection.close()
        what = "refused" if status != 200 else f"cut after {reads} pieces"
        with self._lock:
            self.trouble.append(f"{what} ({status}) after {time.monotonic() - begin:.1f} s: {told[-300:].decode()}")
