"""Requests that are none: fields of wrong types and sizes, tensors of noise, bodies that are no JSON."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import numpy as np
import tritonclient.grpc as triton
from served import grpc_input
from tritonclient.utils import InferenceServerException

from serve_faults_parts.stage import SECONDS, Row, Stage, expect, together

WORKERS = 16
NUMBERS = [0, -1, 1, 3, 2**31 - 1, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
TEXTS = ["", "x", "\x00", "é" * 5000, "\ud800", "<|im_end|>", "../../etc/passwd", "file:///etc/passwd"]
VALUES = [*NUMBERS, *TEXTS, None, True, [], [[]], [None], {}, {"a": [1]}, [1, 2], ["a", 1], [[1]], [0] * 3000]
TRITON = ["text_input", "chat_messages", "input_ids", "max_tokens", "stop_words", "temperature", "top_k", "top_p"]
TRITON += ["seed", "stream", "priority", "deadline_ms", "chat", "ignore_eos", "exclude_input_in_output", "unknown"]
OPENAI = ["model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "temperature", "top_p", "top_k"]
OPENAI += ["seed", "n", "stream", "stream_options", "priority", "deadline_ms", "logit_bias", "tools", "user", "unknown"]
KINDS = ["INT32", "INT64", "FP32", "FP64", "BOOL", "BYTES", "UINT64", "FP16"]
SHAPES = [[1, 1], [1], [1, 3], [2, 2], [1, 0], [0], [1, 1, 1], [1, 1024], [-1, 1]]
MEGABYTE = 2**20
#: Of the right type, and wrong all the same, or nearly.
ODD = {
    "temperature": [float("nan"), float("inf"), -1.0, 3e38],
    "top_p": [float("nan"), 2.0, -1.0, 1e-30],
    "top_k": [-5, 2**31 - 1],
    "seed": [2**64 - 1, 2**63 - 1],
    "max_tokens": [-1, 0, 2**31 - 1],
    "priority": [-(2**31), 2**31 - 1],
    "text_input": [b"\xff\xfe", b"", b"a" * MEGABYTE, b"\x00", "é😀".encode()],
    "chat_messages": [b"{", b"[]", b"[" * 5000, b'[{"role": "user", "content": "\\ud800"}]'],
    "input_ids": [[-1], [10**6], [0] * 5000, [0, 1, 2]],
    "stop_words": [["a"] * 100, [b"\xff"], ["", "e"]],
}


def nonsense(stage: Stage) -> Row:
    """A third each over HTTP, gRPC and the gateway; an answer, whatever it says, must come back."""
    number = stage.count(10_000, 150)
    roads = (_http_nonsense, _grpc_nonsense, _gateway_nonsense)
    stage.resting()
    seen = Counter(together(number, WORKERS, lambda i: roads[i % 3](stage, random.Random(i), i)))
    state = stage.answers_right()
    failed = int(stage.server.metrics().get('echo_requests_total{outcome="failed"}', 0))
    expect(not failed, f"{failed} requests failed instead of being refused")
    expect(not seen["gateway 500"], "the gateway answered with status 500")
    stage.quiet()
    told = ", ".join(f"{name} {count}" for name, count in sorted(seen.items()))
    return Row(f"{number} fuzzed requests", f"all answered ({told}); {state}", "nothing")


def _fuzzed(source: random.Random, valid: dict, names: list[str]) -> bytes:
    """A request with up to three fields of nonsense, or one of 1 MB; some bytes of it may be missing or wrong."""
    request = dict(valid)
    for name in source.sample(names, source.randint(1, 3)):
        request[name] = source.choice(VALUES)
    if "deadline_ms" in request and "deadline_ms" in names and request["deadline_ms"] != valid["deadline_ms"]:
        request["max_tokens"] = 3  # one of the two must end it
    if source.random() < 0.01:
        name = source.choice([name for name in ("text_input", "prompt", "stop") if name in names])
        request[name] = source.choice("aé \x00") * (MEGABYTE // 2 - 500)
    body = json.dumps(request).encode()
    at = source.randint(0, len(body))
    return source.choice([body] * 6 + [body[:at], body.replace(b"e", b"\xff"), body[:at] + b"\xfe" + body[at + 1 :]])


def _http_nonsense(stage: Stage, source: random.Random, number: int) -> str:
    body = _fuzzed(source, {"text_input": "a", "max_tokens": 3, "deadline_ms": 300}, TRITON)
    status, answer = stage.server.post(source.choice(["generate", "generate_stream"]), body, SECONDS)
    expect(200 <= status < 600, f"HTTP status {status}")
    return "HTTP error" if status != 200 or b'"error"' in answer else "HTTP text"


def _gateway_nonsense(stage: Stage, source: random.Random, number: int) -> str:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    path, prompt = source.choice([("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "a"})])
    body = _fuzzed(source, {"model": "echo", **prompt, "max_tokens": 3, "deadline_ms": 300}, OPENAI)
    return f"gateway {stage.gateway(body, path)[0]}"


def _grpc_nonsense(stage: Stage, source: random.Random, number: int) -> str:
    """Tensors of odd values, of wrong types and shapes, of bytes that are none of their type."""
    valid = {"text_input": "a", "max_tokens": 3, "deadline_ms": 300}
    tensors = {name: grpc_input(name, value) for name, value in valid.items()}
    for name in source.sample(sorted(ODD), source.randint(0, 2)):
        tensors[name] = grpc_input(name, source.choice(ODD[name]))
    for name in source.sample(TRITON, source.randint(0, 2)):
        tensors[name] = triton.InferInput(name, source.choice(SHAPES), source.choice(KINDS))
        size = MEGABYTE if source.random() < 0.01 else source.choice([0, 1, 4, 5, 8, 12, 4096])
        tensors[name]._raw_content = np.random.default_rng(number).bytes(size)
    answers: list = []
    with triton.InferenceServerClient(f"127.0.0.1:{stage.server.grpc}") as connection:
        connection.start_stream(lambda result, error: answers.append(error or result))
        try:
            connection.async_stream_infer("echo", list(tensors.values()))
            end = time.monotonic() + SECONDS
            while not answers:
                expect(time.monotonic() < end, f"no answer over gRPC to request {number}")
                time.sleep(0.002)
        except InferenceServerException as error:
            answers.append(error)
        connection.stop_stream(cancel_requests=True)
    return "gRPC error" if isinstance(answers[0], InferenceServerException) else "gRPC text"


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b"{'text_input': 'a'}",
    b'{"a": 1}}',
    b'{"text_input": "\xff"}',
]
BODIES += [b'{"text_input": "a", "max_tokens": 1e', b'{"text_input": "\\ud800"', b"[" * 50_000, b'{"a":' * 50_000]
BODIES += [b'{"seed": ' + b"9" * 5000 + b"}", b"\x00" * 1000, b"GET / HTTP/1.1\r\n\r\n"]


def malformed(stage: Stage) -> Row:
    """Bodies that are no JSON, or no request."""
    times = stage.count(20, 1)
    for body in BODIES * times:
        status, answer = stage.server.post("generate", body, SECONDS)
        expect(400 <= status < 600 and answer, f"Triton says {status} to {body[:30]!r}")
        status, answer = stage.gateway(body)
        expect(status == 400 and b'"message"' in answer, f"the gateway says {status} to {body[:30]!r}")
    state = stage.answers_right()
    stage.quiet()
    told = "Triton an error in JSON each, the gateway 400 each"
    return Row(f"{len(BODIES) * times} bodies of malformed JSON on each port", f"{told}; {state}", "nothing")
