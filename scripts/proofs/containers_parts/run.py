"""What the steps share: commands, servers in containers, and streams of which none may be cut or refused."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

PROJECT = Path(__file__).resolve().parents[3]
SHORT, LONG, START, PATIENCE = 120, 1500, 400, 240  # seconds: a command, a build, a server's start, an answer's piece
IMAGE, NAME, USER = "echo-trt:cpu", "echo-trt-proof", 10001
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
TMP = ("--tmpfs", "/tmp:size=256m,mode=1777")
ENGINE, API = "echo_trt.engine.process", "echo_trt.server"  # modules, by which their processes are found
KILL = """
import os, psutil, sys
found = [p for p in psutil.process_iter() if sys.argv[1] in p.cmdline() and p.pid != os.getpid()]
[p.kill() for p in found] or sys.exit("no such process")"""
CHAT = "/v1/chat/completions"
CLIENT = httpx.Client(timeout=PATIENCE, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
QUESTION = "Write a long list of things that one can see in a harbour, with a sentence about each."


class Missed(Exception):
    """A step that did not show what it must; the message says what was seen."""


@dataclass(frozen=True)
class Bench:
    """Where the steps work. ``port``: the first of some that they take on 127.0.0.1. ``tests``: scripts/test, too."""

    folder: Path
    bundle: Path
    port: int
    tests: bool = False

    def options(self, port: int = 0) -> list[str]:
        """Return what ``docker run`` gets for a hardened server; 0: no port of it is published."""
        return [*HARDENED, "-v", f"{self.bundle}:/bundle:ro", *(["-p", f"127.0.0.1:{port}:9000"] if port else [])]


STEPS: dict[str, Callable[[Bench], str]] = {}  # in the order of their run


def step(name: str) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Put a function into the table: it returns what was seen, or raises Missed."""
    return lambda function: STEPS.setdefault(name, function)


def run(*words: object, seconds: float = SHORT, check: bool = True, **more) -> str:
    """Return what a command wrote to both its outputs; raise Missed with the end of it where it fails."""
    begin = [str(word) for word in words]
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | more
    try:
        done = subprocess.run(begin, timeout=seconds, **given)
    except subprocess.TimeoutExpired as late:
        raise Missed(f"{' '.join(begin)[:150]} took more than {seconds:.0f} s") from late
    if check and done.returncode:
        raise Missed(f"{' '.join(begin)[:150]} ended with {done.returncode}: {done.stdout[-1500:].strip()}")
    return done.stdout.strip()


docker = partial(run, "docker")


def until(holds: Callable[[], object], seconds: float, what: str) -> float:
    """Wait until ``holds`` is true and return the seconds that it took; raise Missed after ``seconds``."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > seconds:
            raise Missed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - begin


# -- containers ------------------------------------------------------------------------------------------------------


@dataclass
class Container:
    """One that runs. ``seconds``: from its start to its first answer."""

    name: str
    port: int = 0
    seconds: float = 0

    def logs(self) -> str:
        return docker("logs", self.name, check=False)

    def line(self, words: str) -> str:
        """Return the last line of its log with these words, or ""."""
        return next((line for line in reversed(self.logs().splitlines()) if words in line), "")

    def state(self, field: str) -> str:
        return docker("inspect", "--format", f"{{{{.State.{field}}}}}", self.name)

    def inside(self, *words: object, **more) -> str:
        return docker("exec", self.name, *words, **more)

    def stop(self) -> None:
        """``docker stop``; raise Missed where answers were not finished."""
        docker("stop", "--time", 90, self.name, seconds=100)
        if (code := self.state("ExitCode")) != "0":
            raise Missed(f"exit code {code} after docker stop")

    def comes_back(self, module: str) -> str:
        """End a module's process with signal 9; return how long it took until an answer came."""
        begin = time.monotonic()
        self.inside("python", "-c", KILL, module)
        until(lambda: not serves(self.port), 20, f"the end of {module} shows")
        until(partial(serves, self.port), START, f"{module} comes back")
        answer(self.port)
        return f"{module} killed: answers after {time.monotonic() - begin:.1f} s"


@contextmanager
def container(*words: object, name: str = NAME, port: int = 0) -> Iterator[Container]:
    """``docker run`` in the background; removed at the end. A failure inside comes with the end of its log."""
    docker("rm", "--force", name, check=False)
    made = Container(name, port)
    try:
        docker("run", "--detach", "--name", name, *words)
        yield made
    except Missed as missed:
        raise Missed(f"{missed}\nthe log of {name}:\n{made.logs()[-2500:]}") from missed
    finally:
        docker("rm", "--force", "--volumes", name, seconds=120, check=False)


@contextmanager
def server(
    bench: Bench, *more: str, tmp: Sequence[str] = TMP, image: str = IMAGE, port: int = 0, command: Sequence[str] = ()
) -> Iterator[Container]:
    """Run a hardened server until its first answer."""
    port = port or bench.port
    with container(*bench.options(port), *tmp, *more, image, *command, name=f"{NAME}-{port}", port=port) as made:
        until(lambda: serves(port) or made.state("Running") == "false", START, "a server answers")
        if made.state("Running") == "false":
            raise Missed("the server has ended")
        answer(port)
        made.seconds = time.time() - float(run("date", "-d", made.state("StartedAt"), "+%s.%N"))
        yield made


# -- their clients ---------------------------------------------------------------------------------------------------


def body(tokens: int, **more) -> dict:
    return {"model": "echo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens} | more


def asked(path: str, content: dict | None, key: str, port: int) -> dict:
    """Return a request of httpx, a GET without ``content``."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url, method = f"http://127.0.0.1:{port}{path}", "POST" if content else "GET"
    return {"method": method, "url": url, "json": content, "headers": headers}


def ask(port: int, path: str = CHAT, content: dict | None = None, key: str = "") -> tuple[int, str]:
    """Return a reply's status and text; 0 and the error where nobody answers."""
    try:
        reply = CLIENT.request(**asked(path, content, key, port))
        return reply.status_code, reply.text
    except httpx.HTTPError as error:
        return 0, repr(error)


def serves(port: int, path: str = "/health", content: dict | None = None, key: str = "") -> bool:
    return ask(port, path, content, key)[0] == 200


def answer(port: int, tokens: int = 16) -> None:
    """Raise Missed if there is no answer."""
    status, text = ask(port, content=body(tokens))
    if status != 200 or not json.loads(text)["choices"][0]["message"]["content"]:
        raise Missed(f"no answer but {status}: {text[:300]}")


def streamed(port: int, meanwhile: Callable[[], object] = bool, **more) -> str:
    """Let 32 clients have one stream each, and do something when all flow; return what was seen."""
    with Streams(port, once=True, **more) as streams:
        until(lambda: not streams.waiting or streams.trouble, PATIENCE, "all streams flow")
        meanwhile()
    return streams.check()


class Streams:
    """``count`` clients with one stream after the other until the end, or ``once``; what became of their answers.

    whole, pieces  answers, and how many pieces came by themselves of the answer that had the most
    waiting        clients that have not had the first piece of their first answer
    """

    def __init__(self, port: int, count: int = 32, tokens: int = 48, key: str = "", once: bool = False) -> None:
        self.waiting, self.whole, self.pieces, self.trouble = set(range(count)), 0, 0, []
        self._asked = asked(CHAT, body(tokens, stream=True, ignore_eos=True), key, port)
        self._ended, self._once, self._lock = threading.Event(), once, threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(count)]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)

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

    def _client(self, number: int) -> None:
        while True:
            pieces, status, end = [], 0, ""
            try:
                with CLIENT.stream(**self._asked) as reply:
                    status = reply.status_code
                    for piece in reply.iter_raw():
                        self.waiting.discard(number)
                        pieces.append(piece)
            except httpx.HTTPError as error:
                end = repr(error)
            text = b"".join(pieces).decode(errors="replace")
            with self._lock:
                if status == 200 and "[DONE]" in text and '"error"' not in text:
                    self.whole, self.pieces = self.whole + 1, max(self.pieces, len(pieces))
                else:
                    self.trouble.append(f"status {status}, ended after {len(pieces)} pieces: {end or text[-300:]}")
            if self._once or self._ended.wait(0.5):
                return
