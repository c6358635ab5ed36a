"""Load on servers: streams that ask again as soon as their answer has ended; several servers take turns.

    python scripts/benchmarks/serve_load.py prompts.jsonl --url http://localhost:9000 --streams 1,16,64
    python scripts/benchmarks/serve_load.py prompts.jsonl --url grpc://localhost:8001 --streams 64 --seconds 60
    python scripts/benchmarks/serve_load.py prompts.jsonl --rounds 5 --json load.json \
        --server 'old=env -C OLD PYTHONPATH=.:plugins python -m echo_trt serve BUNDLE --openai-port {port}
                  --http-port {free} --grpc-port {free} --metrics-port {free}' \
        --server 'new=python -m echo_trt serve BUNDLE --openai-port {port}'

--url names a server that runs: the OpenAI API, or Triton's gRPC. --server starts one; {port} becomes its OpenAI API's
port, every {free} another port. All servers run at once, and only one of them is loaded at a time. Prints tokens and
messages per second and the time to first token, medians of the rounds, and their ratios to the first server's of the
same round. Exit code 1 where a request failed.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import httpx
import numpy as np
import psutil
from cyclopts import Parameter

from echo_trt.engine.options import bounds
from echo_trt.errors import UserError
from echo_trt.files.prompts import read_prompts

SETTLE_S = 2.0  # seconds of a turn before its window; larger: more places are taken when it begins
READY_S = 300.0  # seconds from a server's start to its first answer, at most
RUNNING = {"include_usage": True, "continuous_usage_stats": True}


class Door(Protocol):
    """A way into a server."""

    def ask(self, prompt: str, max_tokens: int) -> AsyncIterator[int]:
        """Ask for one streamed answer; yield the tokens of each message. Raises RuntimeError where it is refused."""

    async def close(self) -> None: ...


class HTTPDoor:
    """The OpenAI API."""

    def __init__(self, url: str):
        # A connection that is kept may be closed by the server just as the next request is sent.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client, self._model = httpx.AsyncClient(base_url=url, timeout=120, limits=limits), ""

    async def ask(self, prompt: str, max_tokens: int) -> AsyncIterator[int]:
        if not self._model:
            self._model = (await self._client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        body |= {"temperature": 0, "stream": True, "stream_options": RUNNING}
        reported = 0
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError((await reply.aread()).decode(errors="replace"))
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(json.dumps(event["error"]))
                total = (event.get("usage") or {}).get("completion_tokens", 0)
                if total > reported:
                    yield total - reported
                    reported = total

    async def close(self) -> None:
        await self._client.aclose()


class TritonDoor:
    """Triton's gRPC, which needs tritonclient[grpc]."""

    def __init__(self, address: str):
        from tritonclient.grpc import aio

        self._client = aio.InferenceServerClient(address)

    async def ask(self, prompt: str, max_tokens: int) -> AsyncIterator[int]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            inputs = _tensors(prompt, max_tokens)
            yield {"model_name": "echo", "inputs": inputs, "enable_empty_final_response": True}

        async for result, error in self._client.stream_infer(requests()):
            if error is not None:
                raise RuntimeError(str(error))
            yield result.as_numpy("output_ids").size
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    async def close(self) -> None:
        await self._client.close()


def _tensors(prompt: str, max_tokens: int) -> list[Any]:
    from tritonclient.grpc import InferInput

    values = (
        ("text_input", "BYTES", np.array([[prompt.encode()]], object)),
        ("chat", "BOOL", np.array([[True]])),
        ("stream", "BOOL", np.array([[True]])),
        ("max_tokens", "INT32", np.array([[max_tokens]], np.int32)),
    )
    tensors = []
    for name, kind, array in values:
        tensors.append(InferInput(name, array.shape, kind))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def door_to(url: str) -> Door:
    return TritonDoor(url.removeprefix("grpc://")) if url.startswith("grpc://") else HTTPDoor(url)


@dataclass
class Window:
    """What clients saw in a turn: seconds to the first token by request, tokens and messages in ``seconds``."""

    seconds: float
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    messages: int = 0
    errors: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        first = 1e3 * np.array(self.first or [np.nan])
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "messages_per_s": self.messages / self.seconds,
            "ttft_ms": float(np.median(first)),
            "ttft_p99_ms": float(np.percentile(first, 99)),
        }


async def turn(door: Door, prompts: list[str], streams: int, seconds: float, max_tokens: int) -> Window:
    """Load one server. What is open at the end is left by its clients, as it must be for a server's next turn."""
    window, begin = Window(seconds), time.perf_counter() + SETTLE_S

    async def slot(number: int) -> None:
        while True:
            sent, first = time.perf_counter(), True
            try:
                async with aclosing(door.ask(prompts[number % len(prompts)], max_tokens)) as messages:
                    async for tokens in messages:
                        now = time.perf_counter()
                        if first and sent >= begin:
                            window.first.append(now - sent)
                        first = False
                        if now >= begin:
                            window.tokens, window.messages = window.tokens + tokens, window.messages + 1
            except (RuntimeError, httpx.HTTPError) as error:
                window.errors.append(str(error) or type(error).__name__)
                await asyncio.sleep(0.1)
            number += streams

    slots = [asyncio.create_task(slot(number)) for number in range(streams)]
    await asyncio.sleep(SETTLE_S + seconds)
    for task in slots:
        task.cancel()
    await asyncio.gather(*slots, return_exceptions=True)
    await asyncio.sleep(SETTLE_S / 4)
    return window


async def measure(
    urls: dict[str, str], prompts: list[str], streams: list[int], seconds: float, rounds: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Return a row for every turn: round, streams, server and figures. The order turns from round to round."""
    doors, rows = {name: door_to(url) for name, url in urls.items()}, []
    for door in doors.values():  # the first calls are slow
        await turn(door, prompts, max(streams), 1.0, max_tokens)
    for number in range(rounds):
        for size in streams:
            for name in list(doors)[:: 1 - 2 * (number % 2)]:
                window = await turn(doors[name], prompts, size, seconds, max_tokens)
                row = {"round": number, "streams": size, "server": name, **window.figures(), "errors": window.errors}
                print(f"round {number}, {size} streams, {name}: {row['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
                rows.append(row)
    for door in doors.values():
        await door.close()
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for every number of streams and server: medians of the rounds, ratios to the first server."""
    names = list(dict.fromkeys(row["server"] for row in rows))
    for streams in dict.fromkeys(row["streams"] for row in rows):
        mine = {name: [r for r in rows if (r["server"], r["streams"]) == (name, streams)] for name in names}
        for name, own in mine.items():

            def shown(key: str, own: list[dict[str, Any]] = own, base: list[dict[str, Any]] = mine[names[0]]) -> str:
                # None of a round in which the first server has answered nothing.
                ratios = [a[key] / b[key] for a, b in zip(own, base, strict=True) if b[key]] or [float("nan")]
                median, ratio = statistics.median(r[key] for r in own), statistics.median(ratios)
                return f"{median:8.1f}" + f" ({ratio:.3f})" * (own is not base)

            errors = sum(len(r["errors"]) for r in own)
            yield (
                f"{streams:4} streams  {name:10} {shown('tokens_per_s')} tokens/s {shown('messages_per_s')} messages/s"
                f"   first token {shown('ttft_ms')} ms median {shown('ttft_p99_ms')} ms p99   {errors} errors"
            )


@contextmanager
def started(name: str, command: str) -> Iterator[str]:
    """Start a server, wait for its first answer, say how long that took; yield its URL."""
    ports = iter(_free_ports(command.count("{free}") + 1))
    port = next(ports)
    words = [_with_ports(word.replace("{port}", str(port)), ports) for word in shlex.split(command)]
    with tempfile.TemporaryFile() as log:
        begin = time.monotonic()
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(url):
                if process.poll() is not None or time.monotonic() - begin > READY_S:
                    log.seek(0)
                    output = log.read().decode(errors="replace")[-2000:]
                    raise SystemExit(f"error: server {name} has not answered: {output}")
                time.sleep(0.05)
            seconds = time.monotonic() - begin
            print(
                f"{name}: first answer after {seconds:.1f} s, memory {_mebibytes(process.pid):,.0f} MiB",
                file=sys.stderr,
            )
            yield url
        finally:
            process.terminate()
            process.wait()


def _mebibytes(pid: int) -> float:
    """Memory of a process and all below it; what they share counts once."""
    parent = psutil.Process(pid)
    return sum(one.memory_full_info().pss for one in (parent, *parent.children(recursive=True))) / 2**20


def _with_ports(word: str, ports: Iterator[int]) -> str:
    while "{free}" in word:
        word = word.replace("{free}", str(next(ports)), 1)
    return word


def _free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]


def _answers(url: str) -> bool:
    try:
        model = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": model, "prompt": "A", "max_tokens": 1}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    except (httpx.HTTPError, ValueError, LookupError):
        return False


def main(
    prompts: Annotated[list[Path], Parameter(help="JSONL files.")],
    url: Annotated[list[str] | None, Parameter(help="A running server; NAME=URL names it.")] = None,
    server: Annotated[list[str] | None, Parameter(help="NAME=COMMAND of a server to start.")] = None,
    streams: Annotated[str, Parameter(help="Answers open at once, by commas.")] = "1,16,64",
    seconds: Annotated[float, Parameter(validator=bounds(1), help="Of a turn.")] = 15,
    rounds: Annotated[int, Parameter(validator=bounds(1), help="Turns of every server.")] = 1,
    max_tokens: Annotated[int, Parameter(validator=bounds(1), help="New tokens of an answer.")] = 64,
    json_file: Annotated[Path | None, Parameter("--json", help="Write all rows here.")] = None,
) -> None:
    texts = [row.text for file in prompts for row in read_prompts(file)]
    urls = dict(one.split("=", 1) if "=" in one.split("//")[0] else (one, one) for one in url or [])
    if not urls and not server:
        raise UserError("give --url of a server that runs, or --server with a command.")
    with ExitStack() as running:
        for one in server or []:
            name, _, command = one.partition("=")
            urls[name] = running.enter_context(started(name, command))
        sizes = [int(size) for size in streams.split(",")]
        rows = asyncio.run(measure(urls, texts, sizes, seconds, rounds, max_tokens))
    print("\n".join(table(rows)))
    errors = [error for row in rows for error in row["errors"]]
    for error in sorted(set(errors))[:3]:
        print(f"error: {error}", file=sys.stderr)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    raise SystemExit(1 if errors else 0)
