"""The real Triton, sent nonsense over HTTP and gRPC, and requests for what is none of a client's business."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from served import grpc_input, needs_triton

pytestmark = needs_triton
TRITON = True
GREEDY = {"text_input": "the theme of a thing, ", "max_tokens": 40, "ignore_eos": True}
NONSENSE = [None, True, -1, 0, 3, 2**31, -(2**63), 2**70, 1e308, -0.0, "", "x", "\x00", [], [1], ["a", "b"], [[1]], {}]
NAMES = ["text_input", "chat_messages", "input_ids", "max_tokens", "stop_words", "temperature", "top_k", "top_p"]
NAMES += ["presence_penalty", "repetition_penalty", "return_log_probs", "top_logprobs"]
NAMES += ["seed", "stream", "priority", "deadline_ms", "chat", "unknown"]


def test_nonsense_over_http_is_answered(server):
    source = random.Random(1)
    for _ in range(120):
        request = {source.choice(NAMES): source.choice(NONSENSE) for _ in range(source.randint(1, 4))}
        body = json.dumps({"max_tokens": 3, **request}).encode()
        body = source.choice([body, body, body, body[: source.randint(0, len(body))], body.replace(b"e", b"\xff")])
        status, answer = server.post(source.choice(["generate", "generate_stream"]), body, seconds=60)
        assert 200 <= status < 600
        assert answer
    assert server.generate(**GREEDY)["completion_tokens"] == 40
    server.rest()


def test_deeply_nested_json_is_refused(server):
    deep = b'{"text_input": ' + b"[" * 2**20
    for body in (deep, deep + b"]" * 2**20 + b"}"):
        status, answer = server.post("generate", body)
        assert status >= 400
        assert b"error" in answer
    assert server.generate(**GREEDY)["completion_tokens"] == 40
    assert "starting it again" not in server.err


def test_nonsense_over_grpc_is_answered(server):
    import tritonclient.grpc as client
    from tritonclient.utils import InferenceServerException

    source, kinds = random.Random(2), ["INT32", "INT64", "FP32", "BOOL", "BYTES", "UINT64"]
    noise = np.random.default_rng(2)
    for _ in range(80):
        stream = server.stream(text_input="a", max_tokens=3)
        assert "text_output" in list(stream)[-1]
        name, kind = source.choice(NAMES), source.choice(kinds)
        tensor = client.InferInput(name, source.choice([[1, 1], [1], [1, 3], [2, 2], [1, 0]]), kind)
        tensor._raw_content = noise.bytes(source.choice([0, 1, 4, 8, 12, 4096]))
        with client.InferenceServerClient(f"127.0.0.1:{server.grpc}") as connection:
            answers: list = []
            connection.start_stream(lambda result, error, answers=answers: answers.append(error or result))
            try:
                connection.async_stream_infer("echo", [grpc_input("max_tokens", 3), tensor])
                end = time.monotonic() + 120
                while not answers:
                    assert time.monotonic() < end
                    time.sleep(0.002)
            except InferenceServerException:
                pass
            connection.stop_stream()
    for value in (float("nan"), float("inf"), -float("inf")):
        assert "temperature is" in server.stream(text_input="a", temperature=value).next()["error"]
    assert "not UTF-8" in server.stream(text_input=b"\xff\xfe").next()["error"]
    assert "seed is" in server.stream(text_input="a", seed=2**64 - 1).next()["error"]
    server.rest()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("repository/index", {}),
        ("repository/models/other/load", {"parameters": {"config": "{}"}}),
        ("repository/models/echo/unload", {}),
        ("systemsharedmemory/region/a/register", {"key": "/a", "offset": 0, "byte_size": 8}),
        ("trace/setting", {"trace_level": ["TIMESTAMPS"]}),
        ("logging", {"log_verbose_level": 1}),
    ],
)
def test_no_request_reaches_files_or_memory_of_the_machine(server, path, body):
    status, answer = server.post(path, json.dumps(body).encode(), below="")
    assert (status, b"restricted" in answer) == (403, True), answer


def test_nor_over_grpc(server):
    import tritonclient.grpc as client
    from tritonclient.utils import InferenceServerException

    with client.InferenceServerClient(f"127.0.0.1:{server.grpc}") as connection:
        for forbidden in (
            lambda: connection.load_model("other", config="{}"),
            lambda: connection.register_system_shared_memory("a", "/a", 8),
            lambda: connection.update_log_settings({"log_verbose_level": 1}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                forbidden()


def test_it_is_the_same_server_as_at_the_start(server):
    assert "again" not in server.err
    assert "died" not in server.err
    assert "Traceback" not in server.err
