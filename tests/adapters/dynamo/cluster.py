"""``echo-trt serve --replicas`` as a process whose workers tests can kill, and a client that reads its streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from served import free_ports
from waiting import wait_until

from echo_trt.supervision.process import listening_ports

SECONDS = 240
NAME = "echo"
SETTINGS = {
    "DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS": "1000",
    "DYN_LOG": "info,tower_http=off",
    "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
    "COLUMNS": "400",
}


@dataclass
class Reply:
    """What came of a request. status: of HTTP; error: a body that is no answer, or an error within the stream."""

    status: int = 200
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    worker: int | None = None
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""
    times: list[float] = field(default_factory=list)  # time.monotonic() of the chunks with tokens


@dataclass(frozen=True)
class Worker:
    """A worker's process, and the port of its metrics."""

    pid: int
    port: int

    def healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def metrics(self) -> dict[str, float]:
        """Return the sums over labels."""
        sums: dict[str, float] = {}
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text
        for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", text, re.MULTILINE):
            sums[name] = sums.get(name, 0) + float(value)
        return sums


class Cluster:
    """A frontend and its workers under one launcher; as a context, which ends with them."""

    def __init__(self, bundle: Path, folder: Path, *options: object, replicas: int = 2, **settings: str):
        """Prepare a cluster. ``settings``: environment variables of all processes."""
        self.bundle, self.folder = bundle, folder
        self.discovery, self._log = folder / "discovery", folder / "log"
        [self.port] = free_ports(1)
        own = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
        self.environment = {**own, **SETTINGS, "DYN_FILE_KV": str(self.discovery), **settings}
        words = ["serve", bundle, "--replicas", replicas, "--openai-port", self.port, *options]
        self.process = self._start(self._log, *words)
        self._joined: list[subprocess.Popen] = []

    def _start(self, log: Path, *words: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "echo_trt", *map(str, words)]
        with log.open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)

    def join(self, *options: object) -> subprocess.Popen:
        """Start a worker more, which the launcher does not know."""
        [port] = free_ports(1)
        words = ["worker", self.bundle, "--name", NAME, "--system-port", port, *options]
        settings = {"DYN_DISCOVERY_BACKEND": "file"}
        self.environment = self.environment | settings
        self._joined.append(self._start(self.folder / f"worker-{port}.log", *words))
        return self._joined[-1]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for process in (self.process, *self._joined):
            process.kill()
            process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def children(self, mark: str) -> list[tuple[int, list[str]]]:
        """Process ids and words of the launcher's processes that have ``mark`` among their words."""
        found = []
        for process in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                found.append((process.pid, process.cmdline()))
        return sorted((pid, words) for pid, words in found if mark in words)

    @property
    def workers(self) -> list[Worker]:
        """The launcher's and those that joined."""
        processes = self.children("worker")
        processes += [(process.pid, list(process.args)) for process in self._joined if process.poll() is None]
        return [Worker(pid, int(words[words.index("--system-port") + 1])) for pid, words in processes]

    @property
    def frontend(self) -> int:
        [(pid, _)] = self.children("dynamo.frontend")
        return pid

    def wait_for_workers(self, number: int = 2) -> None:
        """Until so many are healthy and the frontend knows them, and no others."""
        self.wait(lambda: sum(worker.healthy() for worker in self.workers) == number)
        self.wait(lambda: len(self.entries("mdc")) == number and self.models() == [NAME], 60)
        time.sleep(0.5)  # for the frontend to read what has changed

    def wait(self, fits: Callable[[], bool], seconds: float = SECONDS) -> None:
        wait_until(lambda: fits() or self.process.poll() is not None, seconds, lambda: self.log[-4000:])
        assert self.process.poll() is None, self.log[-4000:]

    def entries(self, kind: str) -> list[Path]:
        index = self.discovery / "v1" / kind
        return list(index.iterdir()) if index.exists() else []

    def models(self) -> list[str]:
        try:
            return [model["id"] for model in httpx.get(self.url("models"), timeout=5).json()["data"]]
        except (httpx.HTTPError, KeyError, ValueError):
            return []

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/v1/{path}"

    def worker_of(self, instance: int) -> Worker:
        """Return the worker that Dynamo knows by this id: it listens where its entry says."""
        texts = (entry.read_text() for entry in self.entries("instances"))
        own = "".join(text for text in texts if str(instance) in text)
        ports = {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", own)}
        [worker] = [worker for worker in self.workers if listening_ports(worker.pid) & ports]
        return worker

    def stream(self, prompt: list[int] | str, headers: dict[str, str] | None = None, **more: Any) -> Iterator[Reply]:
        """Ask for a completion; yields the reply as it grows, and at the end."""
        body = {"model": NAME, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **more}
        body["nvext"] = {"extra_fields": ["worker_id", "completion_token_ids"], **more.get("nvext", {})}
        yield from self._streamed("completions", body, headers)

    def chat(self, messages: list[dict[str, Any]]) -> Reply:
        """Return the whole answer to a chat."""
        return list(self._streamed("chat/completions", {"model": NAME, "messages": messages, "stream": True}, None))[-1]

    def _streamed(self, path: str, body: dict[str, Any], headers: dict[str, str] | None) -> Iterator[Reply]:
        reply = Reply()
        with httpx.stream("POST", self.url(path), json=body, headers=headers, timeout=SECONDS) as answer:
            if answer.status_code != 200:
                yield Reply(answer.status_code, error=answer.read().decode())
                return
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._read(json.loads(line.removeprefix("data: ")), reply)
                elif line and line != "data: [DONE]":
                    reply.error += line
                yield reply

    def ask(self, prompt: list[int] | str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
        return list(self.stream(prompt, headers, **more))[-1]

    @staticmethod
    def _read(chunk: dict[str, Any], reply: Reply) -> None:
        if "choices" not in chunk:
            reply.error += json.dumps(chunk)
            return
        for choice in chunk["choices"]:
            reply.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            reply.reason = choice.get("finish_reason") or reply.reason
            if (logprobs := choice.get("logprobs")) and "tokens" in logprobs:
                reply.logprobs += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        reply.usage = chunk.get("usage") or reply.usage
        more = chunk.get("nvext") or {}
        if tokens := more.get("completion_token_ids"):
            reply.token_ids += tokens
            reply.times.append(time.monotonic())
        reply.worker = (more.get("worker_id") or {}).get("decode_worker_id") or reply.worker
