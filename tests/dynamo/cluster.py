"""Dynamo's frontend and workers of ours as processes that tests can kill, and a client that reads their streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from served import free_ports

SECONDS = 180
NAME = "close"


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


class Worker:
    def __init__(self, bundle: Path, folder: Path, environment: dict[str, str], *options: object):
        [self.port] = free_ports(1)
        words = [sys.executable, "-m", "echo_trt", "worker", bundle, "--system-port", self.port, *options]
        self.log = folder / f"worker-{self.port}.log"
        with self.log.open("wb") as out:
            command = list(map(str, words))
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def metrics(self) -> dict[str, float]:
        """The sums over labels."""
        sums: dict[str, float] = {}
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text
        for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", text, re.MULTILINE):
            sums[name] = sums.get(name, 0) + float(value)
        return sums


class Cluster:
    """A frontend and two workers; as a context, which ends with them."""

    def __init__(self, bundle: Path, folder: Path, *options: object, number: int = 2):
        self.bundle, self.folder = bundle, folder
        self.options = options or ("--queue", 4, "--drain-timeout", 1)
        self.discovery = folder / "discovery"
        [self.port] = free_ports(1)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DYN_")},
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(self.discovery),
            "DYN_SELF_HOST_METADATA": "0",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_EVENT_PLANE_HOST": "127.0.0.1",
            "DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS": "1000",
            "DYN_LOG": "info,tower_http=off",
            "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "400",
            "OMP_NUM_THREADS": "1",
        }
        self.workers: list[Worker] = []
        self.frontend: subprocess.Popen | None = None
        self.start_frontend()
        for _ in range(number):
            self.start_worker()

    def start_frontend(self) -> None:
        words = ["--router-mode", "kv", "--http-host", "127.0.0.1", "--http-port", self.port, "--migration-limit", 3]
        with (self.folder / "frontend.log").open("ab") as out:
            command = list(map(str, [sys.executable, "-m", "dynamo.frontend", *words]))
            self.frontend = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)

    def start_worker(self, *options: object) -> Worker:
        given = options or self.options
        self.workers.append(Worker(self.bundle, self.folder, self.environment, "--name", NAME, *given))
        return self.workers[-1]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for process in (self.frontend, *(worker.process for worker in self.workers)):
            process.kill()
            process.wait()

    def wait_for_workers(self, number: int) -> None:
        """Until so many are healthy and the frontend knows them."""
        self.wait(lambda: sum(worker.healthy() for worker in self.workers) == number)
        self.wait(lambda: len(self.entries("mdc")) == number and self.models() == [NAME], 30)
        time.sleep(0.5)  # for the frontend to read what has changed

    def wait(self, fits: Callable[[], bool], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not fits():
            assert time.monotonic() < end, "".join(worker.said[-2000:] for worker in self.workers)
            time.sleep(0.1)

    def entries(self, kind: str) -> list[Path]:
        place = self.discovery / "v1" / kind
        return list(place.iterdir()) if place.exists() else []

    def models(self) -> list[str]:
        try:
            return [model["id"] for model in httpx.get(self.url("models"), timeout=5).json()["data"]]
        except (httpx.HTTPError, KeyError, ValueError):
            return []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/{path}"

    def worker_of(self, instance: int) -> Worker:
        """The worker that Dynamo knows by this id."""
        [worker] = [each for each in self.workers if f"{instance}" in each.said or f"{instance:x}" in each.said]
        return worker

    def stream(self, prompt: list[int] | str, headers: dict[str, str] | None = None, **more: Any) -> Iterator[Reply]:
        """Ask for a completion; yields the reply as it grows, and at the end."""
        body = {"model": NAME, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **more}
        body["nvext"] = {"extra_fields": ["worker_id", "completion_token_ids"], **more.get("nvext", {})}
        reply = Reply()
        with httpx.stream("POST", self.url("completions"), json=body, headers=headers, timeout=SECONDS) as answer:
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
        for _reply in self.stream(prompt, headers, **more):
            pass
        return _reply

    @staticmethod
    def _read(chunk: dict[str, Any], reply: Reply) -> None:
        if "choices" not in chunk:
            reply.error += json.dumps(chunk)
            return
        for choice in chunk["choices"]:
            reply.text += choice.get("text") or ""
            reply.reason = choice.get("finish_reason") or reply.reason
            if logprobs := choice.get("logprobs"):
                reply.logprobs += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        reply.usage = chunk.get("usage") or reply.usage
        more = chunk.get("nvext") or {}
        reply.token_ids += more.get("completion_token_ids") or []
        reply.worker = (more.get("worker_id") or {}).get("decode_worker_id") or reply.worker
