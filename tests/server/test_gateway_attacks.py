"""Bodies made to keep the gateway busy: none holds its event loop for long, and a crowd of them keeps nobody out."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from server.running import alone

from echo_trt.server.anthropic.request import MessagesRequest
from echo_trt.server.bodies import parsed
from echo_trt.server.errors import ApiError
from echo_trt.server.fields import Strict
from echo_trt.server.ollama.request import OllamaChatRequest
from echo_trt.server.responses.request import ResponsesRequest
from echo_trt.server.schemas import ChatRequest, CompletionRequest
from echo_trt.server.tokens import DetokenizeRequest, TokenizeRequest

JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"function": {"name": "f"}}
LISTS = json.dumps({"a": [[]] * 49_000})
FIELDS = {f"k{i}": i for i in range(64_000)}


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "echo", "messages": [USER]} | fields, separators=(",", ":")).encode()


def completion(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "echo", "prompt": prompt} | fields, separators=(",", ":")).encode()


def response(given: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "echo", "input": given} | fields, separators=(",", ":")).encode()


def message(**fields: Any) -> bytes:
    return json.dumps({"max_tokens": 5, "model": "echo", "messages": [USER]} | fields, separators=(",", ":")).encode()


def ollama(**fields: Any) -> bytes:
    return json.dumps({"options": {}, "model": "echo", "messages": [USER]} | fields, separators=(",", ":")).encode()


FUNCTION_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
#: Up to a megabyte each.
REFUSED = {
    "messages": chat(messages=[USER] * 26_000),
    "fields": chat(**FIELDS),
    "fields of a refused object": chat(response_format=FIELDS),
    "bias": chat(logit_bias={str(i): "x" for i in range(50_000)}),
    "a long stop string": chat(stop="x" * 1_000_000),
    "parts": chat(messages=[USER | {"content": [{}] * 340_000}]),
    "calls of tools": chat(messages=[{"role": "assistant", "tool_calls": [CALL] * 128}] * 190),
    "tools": chat(tools=[TOOL] * 20_000),
    "a deep schema as text": chat(guided_json="[" * 49_000),
    "fields of an item": response([FIELDS]),
    "fields of a format": response("x", text={"format": FIELDS}),
    "metadata": response("x", metadata={str(i): i for i in range(60_000)}),
    "a wrong token": json.dumps({"tokens": [7] * 200_000 + [-1]}).encode(),
    "token ids": completion([7] * 500_000),
    "a wrong token id": completion([7] * 200_000 + [-1]),
    "long numbers": completion([10**4000] * 240),
    "blocks": message(messages=[USER | {"content": [{}] * 340_000}]),
    "server tools": message(tools=[{"type": "web_search_1"}] * 40_000),
    "Ollama's calls": ollama(messages=[USER | {"tool_calls": [{}] * 300_000}]),
    "options": ollama(options=FIELDS),
}
ACCEPTED = {
    "messages": chat(messages=[USER] * 2048),
    "parts": chat(messages=[USER | {"content": [{"type": "text", "text": "x"}] * 2048}]),
    "calls of tools": chat(messages=[{"role": "assistant", "tool_calls": [CALL] * 128}] * 16),
    "arguments": chat(
        messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": LISTS}}]}]
    ),
    "tools": chat(
        tools=[TOOL | {"function": {"name": f"f{i}", "parameters": {"enum": [1] * 2000}}} for i in range(128)]
    ),
    "token ids": completion([7] * 2**18),
    "calls": response([USER, *[FUNCTION_CALL] * 128] * 15),
    "a chat to tokenize": json.dumps({"messages": [USER] * 2048}).encode(),
    "a prompt": completion("x" * 1_000_000),
    "blocks": message(messages=[USER | {"content": [{"type": "text", "text": "x"}] * 12}] * 2048),
    "a long field": chat(**{"k" * 1_000_000: 1}),
    "an escaped prompt": completion("é\n" * 100_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_body_is_refused_soon_in_a_short_sentence(name):
    with pytest.raises(ApiError) as caught:
        read(REFUSED[name])
    assert len(json.dumps(caught.value.body)) < 700
    assert any(seconds(REFUSED[name]) < 0.1 for _ in range(3))  # 0.05 and less where nothing else runs


@pytest.mark.parametrize("name", ACCEPTED)
def test_as_much_as_the_limits_allow_is_accepted_soon(name):
    assert any(seconds(ACCEPTED[name]) < 0.1 for _ in range(3))


def read(body: bytes) -> Strict:
    kinds: dict[bytes, type[Strict]] = {b'"max_tokens"': MessagesRequest, b'"options"': OllamaChatRequest}
    kinds |= {b'"prompt"': CompletionRequest, b'"input"': ResponsesRequest, b'"tokens"': DetokenizeRequest}
    kinds[b'"model"'], kinds[b""] = ChatRequest, TokenizeRequest
    return parsed(body, next(kind for name, kind in kinds.items() if name in body))


def seconds(body: bytes) -> float:
    """Of this thread, whatever else the machine does."""
    begin = time.thread_time()
    with contextlib.suppress(ApiError):
        read(body)
    return time.thread_time() - begin


@pytest.mark.parametrize("name", ["bias", "a wrong token id", "byte by byte"])
def test_others_are_answered_while_eight_clients_attack(gateway, name):
    client, process = gateway
    end, seen = time.monotonic() + 2, []

    def attack() -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            while time.monotonic() < end:
                if name == "byte by byte":
                    drip(client.base_url.port, end)
                    continue
                body = REFUSED[name]
                path = "/v1/completions" if b'"prompt"' in body else "/v1/chat/completions"
                seen.append(own.post(path, content=body, headers=JSON).status_code)

    threads = [threading.Thread(target=attack) for _ in range(8)]
    for thread in threads:
        thread.start()
    times, memory = [], 0
    while time.monotonic() < end:
        begin = worked(process)
        assert client.get("/v1/models").status_code == 200
        times.append(worked(process) - begin)
        memory = max(memory, process.memory_info().rss)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert set(seen) <= {400}
    assert max(times) < 0.6  # the gateway's work between a question and its answer, whatever else the machine does
    assert memory < 300e6


@pytest.fixture(scope="module")
def gateway() -> Iterator[tuple[httpx.Client, psutil.Popen]]:
    """Return a process of its own, so that what attacks it does not share its interpreter."""
    with alone(stderr=subprocess.DEVNULL) as door:
        yield door


def worked(process: psutil.Process) -> float:
    """Seconds of CPU that it has used."""
    times = process.cpu_times()
    return times.user + times.system


def drip(port: int, end: float) -> None:
    """Send a body of which every byte is a chunk, as fast as it is read."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(head)
        rest = b""
        while time.monotonic() < end:
            rest = rest or b"1\r\n[\r\n" * 1000
            with contextlib.suppress(TimeoutError):
                rest = rest[connection.send(rest) :]
