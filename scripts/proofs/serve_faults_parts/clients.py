"""Clients that misbehave: they leave in the middle, or hardly read."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import numpy as np
from served import GrpcStream

from serve_faults_parts.stage import KEY, PROMPTS, SECONDS, Row, Stage, expect, together

WORKERS = 16
LONG = 1024  # tokens of an answer that nobody waits for


# -- gone in the middle ----------------------------------------------------------------------------------------------


def departures(stage: Stage) -> Row:
    """A third each over HTTP, gRPC and the gateway."""
    number = stage.count(1000, 24)
    before = stage.resting().get('echo_requests_total{outcome="cancelled"}', 0)
    roads = (_leave_http, _leave_grpc, _leave_gateway)
    together(number, min(WORKERS, (stage.batch + stage.queue) // 2), lambda i: roads[i % 3](stage, PROMPTS[i % 4]))
    state = stage.answers_right()
    cancelled = int(stage.server.metrics()['echo_requests_total{outcome="cancelled"}'] - before)
    expect(cancelled > number // 2, f"only {cancelled} requests were cancelled")
    stage.quiet()
    return Row(f"{number} clients gone after the first piece of text", f"{cancelled} cancelled; {state}", "nothing")


def _leave_http(stage: Stage, prompt: str) -> None:
    with _posted(stage, False, stage.ask(prompt, LONG, stream=True)) as connection:
        _until(connection, b"data:")


def _leave_gateway(stage: Stage, prompt: str) -> None:
    with _posted(stage, True, _chat(prompt)) as connection:
        _until(connection, b'"content":"')


def _leave_grpc(stage: Stage, prompt: str) -> None:
    stream = GrpcStream(stage.server.grpc, stage.ask(prompt, LONG))
    expect("error" not in stream.next(), "a stream began with an error")
    stream.cancel()


def _chat(prompt: str) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "echo", "messages": messages, "stream": True, "max_tokens": LONG, "ignore_eos": True}


def _posted(stage: Stage, gateway: bool, request: dict, window: int = 0) -> socket.socket:
    """A connection on which a request for a stream was sent; ``window``: bytes that the system may take in advance."""
    path, port = "/v2/models/echo/generate_stream", stage.server.http
    if gateway:
        path, port = "/v1/chat/completions", stage.server.openai
    body = json.dumps(request).encode()
    connection = socket.socket()
    connection.settimeout(SECONDS)
    if window:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.connect(("127.0.0.1", port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def _until(connection: socket.socket, mark: bytes) -> None:
    seen = b""
    while mark not in seen:
        part = connection.recv(4096)
        expect(part, f"a stream ended before its text: {seen[-200:]!r}")
        seen += part


# -- slow readers ----------------------------------------------------------------------------------------------------


def slow_readers(stage: Stage) -> Row:
    """Others' time between tokens beside readers of a byte a second, and beside as many that read all at once."""
    readers, others = stage.count(16, 2), stage.count(8, 2)
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for slow in (False, True) * (3 if stage.scale >= 1 else 1):
        gaps[slow] += _gaps_beside(stage, readers, others, slow)
    state = stage.answers_right()
    stage.quiet()
    told = {slow: (np.median(g) * 1e3, np.percentile(g, 99) * 1e3) for slow, g in gaps.items()}
    ratio = told[True][0] / told[False][0]
    most = 1.5 if stage.scale >= 1 else 10  # a few short answers say little of speed
    expect(ratio < most, f"others wait {ratio:.2f} times as long between tokens")
    quick, late = (f"{median:.1f} ms (p99 {p99:.1f})" for median, p99 in (told[False], told[True]))
    return Row(
        f"{readers} readers of a byte a second, half of them through the gateway",
        f"{others} others wait {late} between tokens, beside as many fast readers {quick}; {state}",
        "nothing",
    )


def _gaps_beside(stage: Stage, readers: int, others: int, slow: bool) -> list[float]:
    """Seconds a token of ``others`` streams, while ``readers`` are answered too."""
    done, length = threading.Event(), min(LONG, stage.context // 2)
    connections = []
    for i in range(readers):
        prompt = PROMPTS[i % 4]
        request = _chat(prompt) if i % 2 else stage.ask(prompt, stream=True)
        connections.append(_posted(stage, bool(i % 2), {**request, "max_tokens": length}, 2048 if slow else 0))
    threads = [threading.Thread(target=_read, args=(each, slow, done)) for each in connections]
    for thread in threads:
        thread.start()
    gaps = together(2 * others, others, lambda i: _gap(stage, PROMPTS[i % 4]))
    done.set()
    for thread in threads:
        thread.join()
    return gaps


def _read(connection: socket.socket, slow: bool, done: threading.Event) -> None:
    """To the end, or a byte a second until ``done``."""
    connection.settimeout(1)
    with connection:
        while not done.wait(1 if slow else 0):
            with contextlib.suppress(TimeoutError):  # its answer is complete
                if not connection.recv(1 if slow else 65536):
                    return


def _gap(stage: Stage, prompt: str) -> float:
    """Seconds a token of one stream."""
    times, tokens = [], 0
    for piece in GrpcStream(stage.server.grpc, stage.ask(prompt)):
        expect("error" not in piece, f"a stream ended with {piece}")
        times.append(time.monotonic())
        tokens += len(piece["output_ids"])
    return (times[-1] - times[0]) / max(tokens - 1, 1)
