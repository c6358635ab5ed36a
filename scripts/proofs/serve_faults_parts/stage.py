"""The stage: a real server with its clients, the texts that it must give, and one row of the table a fault."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import Served, joined

from echo_trt.bundle.manifest import read_manifest

KEY = "sk-of-the-fault-table"
PROMPTS = ("Why is the sky blue?", "Tell me about the sea.", "What is a theme?", "Name a few things.")
SECONDS = 120.0  # no answer may take longer


class Failed(Exception):
    """Something is not as it must be; the sentence goes into the table."""


def expect(holds: object, sentence: str) -> None:
    if not holds:
        raise Failed(sentence)


@dataclass(frozen=True)
class Row:
    """observed, and what was lost of what clients had asked for."""

    tried: str
    observed: str
    lost: str


@dataclass
class Stage:
    """``scale`` 1 is the full size; ``exact``: texts may not depend on the load, as they may a little in bf16."""

    bundle: Path
    folder: Path
    scale: float = 1.0
    server: Served | None = None
    expected: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    read: int = 0  # characters of the server's log that an earlier fault has accounted for

    def __post_init__(self) -> None:
        manifest = read_manifest(self.bundle)
        limits = manifest.recipe.limits
        self.exact = manifest.precision == "fp32"
        self.batch, self.context = limits.batch, limits.context
        self.queue = self.count(256)
        # Of texts; a batch of them fills the smallest pool (of a full size's context, or that of full_pool).
        self.tokens = max(96, 2 * self.context // self.batch) if self.scale >= 1 else 96

    def count(self, full: int, least: int = 8) -> int:
        return max(least, round(full * self.scale))

    def __enter__(self) -> Stage:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.server:
            self.server.kill()

    # -- the server --------------------------------------------------------------------------------------------------

    def start(self, *options: object) -> Served:
        """A fresh server in place of the one before."""
        if self.server:
            self.server.kill()
        self.starts += 1
        keys = self.folder / "keys"
        keys.write_text(KEY)
        log = self.folder / f"server-{self.starts}.log"
        options = ("--queue", self.queue, "--api-keys-file", keys, *options)
        self.read = 0
        self.server = Served(self.bundle, log, *options, triton=True).wait_for("serving", 300)
        if not self.expected:
            self.expected = {p: self.server.generate(**self.ask(p))["text_output"] for p in PROMPTS}
        return self.server

    def ask(self, prompt: str, tokens: int | None = None, **more: Any) -> dict[str, Any]:
        return {"text_input": prompt, "max_tokens": tokens or self.tokens, "ignore_eos": True, **more}

    def resting(self) -> dict[str, float]:
        """The metrics once nothing runs, nothing waits and no KV block is in use."""
        time.sleep(0.6)  # they are a moment old
        names = ("echo_running", "echo_queued", "echo_blocks_used")
        end = time.monotonic() + 30
        while any((found := self.server.metrics()).get(name) for name in names):
            used = {name: found.get(name) for name in names}
            expect(time.monotonic() < end, f"the server does not come to rest: {used}")
            time.sleep(0.1)
        return found

    def answers_right(self) -> str:
        """It rests, and then says what it has said before."""
        self.resting()
        for prompt, text in self.expected.items():
            expect(self.server.generate(**self.ask(prompt)).get("text_output") == text, "the text is another now")
        return "0 KV blocks in use, right text"

    def next_fault(self) -> None:
        if self.server.process.poll() is not None:  # the fault before was the end
            self.start()
        self.read = len(self.server.err)

    def quiet(self) -> None:
        """Since the fault began, nothing was started again, and no traceback was written. A key never is."""
        expect(KEY not in self.server.err, "the server's log holds an API key")
        for word in ("again", "died", "Traceback"):
            expect(word not in self.server.err[self.read :], f"the server's log holds {word!r}")

    def restarted(self, times: int, seconds: float = 120) -> str:
        """The launcher's own word on how long the last of so many restarts took."""
        end = time.monotonic() + seconds
        while self.server.err.count("serving again after") < times:
            expect(self.server.process.poll() is None, "the launcher has ended")
            expect(time.monotonic() < end, f"it was not started again in {seconds:.0f} s")
            time.sleep(0.1)
        return self.server.err.rsplit("serving again after ", 1)[1].split("\n")[0]

    # -- clients -----------------------------------------------------------------------------------------------------

    def crowd(self, number: int, tokens: int | None = None, prompt: str | None = None, **more: Any) -> Crowd:
        """So many clients over HTTP at once, each with one of the prompts."""
        prompts = [prompt or PROMPTS[i % len(PROMPTS)] for i in range(number)]
        pool = ThreadPoolExecutor(number)
        futures = [pool.submit(attempt, self.server, self.ask(each, tokens, **more)) for each in prompts]
        pool.shutdown(wait=False)
        return Crowd(self, prompts, futures)

    def same(self, pairs: Iterable[tuple[str, str]]) -> str:
        """How many whole texts are the expected ones: all, where the bundle is exact."""
        right = [self.expected[prompt] == text for prompt, text in pairs]
        expect(all(right) or not self.exact, f"{right.count(False)} of {len(right)} texts are other ones")
        return f"{sum(right)} of {len(right)} texts as alone"

    def gateway(self, body: bytes, path: str = "/v1/chat/completions", key: str = KEY) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.openai, timeout=SECONDS)
        try:
            connection.request("POST", path, body, headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()


@dataclass
class Crowd:
    stage: Stage
    prompts: Sequence[str]
    futures: list

    def running(self, number: int) -> None:
        """Return once so many of them are being answered."""
        self.stage.server.wait_metrics(lambda m: m.get("echo_running", 0) >= number, 60)

    def ended(self) -> tuple[list[tuple[str, str]], Counter[str]]:
        """(prompt, text) of whole answers, and the errors, counted. None may hang."""
        answers = [future.result(SECONDS + 10) for future in self.futures]
        whole = [(p, a["text_output"]) for p, a in zip(self.prompts, answers, strict=True) if "error" not in a]
        errors = Counter(answer["error"] for answer in answers if "error" in answer)
        expect("TimeoutError" not in errors, "a client waited in vain")
        return whole, errors


def attempt(server: Served, request: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error in a word."""
    try:
        return json.loads(server.post("generate", json.dumps(request).encode(), SECONDS)[1])
    except (OSError, ValueError, http.client.HTTPException) as error:
        return {"error": type(error).__name__}


def whole_text(pieces: Iterable[dict[str, Any]]) -> str:
    pieces = list(pieces)
    expect("error" not in pieces[-1], f"a stream ended with {pieces[-1]}")
    return joined(pieces)[0]


def together(number: int, workers: int, task: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(task, range(number)))
