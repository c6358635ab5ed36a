"""The real Triton, asked as its clients ask: text, streams, details, departures, nonsense, and what is forbidden."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import socket
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from asking import ask
from byte_tokenizer import ASSISTANT, END, USER
from served import grpc_input, joined, joined_lists, needs_triton, triton

from echo_trt.adapters.triton.server import PREFIX
from echo_trt.engine.host_memory import gigabytes
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.process import wire
from echo_trt.engine.request import Event

pytestmark = needs_triton
TRITON = True
PROMPT = "the theme of a thing, "
GREEDY = {"text_input": PROMPT, "max_tokens": 40, "ignore_eos": True}
LONG = GREEDY | {"max_tokens": 440}


@pytest.fixture(scope="module")
def offline(roomy_bundle) -> LLM:
    return LLM(roomy_bundle, "autoregressive", 1)


@pytest.mark.parametrize("stop", [(), ("e", "th", "\u00e9")], ids=["whole", "stopped"])
def test_the_same_text_and_details_by_every_road(stop, server, offline):
    way: dict[str, Any] = {"max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 2**40 + 7}
    way |= {"presence_penalty": -0.7, "frequency_penalty": 1.1, "repetition_penalty": 1.3, "ignore_eos": not stop}
    ids = offline.tokenizer.encode(PROMPT)
    [expected] = offline.generate([ids], SamplingParams(**way, stop=stop, logprobs=3))
    logprobs = [entry.logprob for entry in expected.logprobs]
    way |= {"return_log_probs": True, "top_logprobs": 3, "token_sources": True}
    way |= {"stop_words": list(stop)} if stop else {}
    for pieces in (
        [server.generate(text_input=PROMPT, **way)],
        server.generate_stream(input_ids=ids, **way),
        list(server.stream(text_input=PROMPT, **way)),
        list(server.stream(input_ids=ids, **way | {"stream": False})),
    ):
        assert joined(pieces) == (expected.text, expected.token_ids)
        assert pieces[-1]["finish_reason"] == expected.finish_reason
        assert (pieces[-1]["prompt_tokens"], pieces[-1]["completion_tokens"]) == (len(ids), len(expected.token_ids))
        assert all("finish_reason" not in piece for piece in pieces[:-1])
        assert joined_lists(pieces, "output_log_probs") == pytest.approx(logprobs, abs=1e-4)
        assert pieces[-1]["cum_log_probs"] == pytest.approx(sum(logprobs), abs=1e-3)
        for name in ("logprobs", "token_sources"):
            entries = [entry for piece in pieces for entry in json.loads(piece[name])]
            output = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
            assert output == expected.text or (expected.finish_reason == "stop" and output.startswith(expected.text))
        assert {"target"} < {entry["source"] for entry in entries}
    assert not {"output_log_probs", "token_sources"} & server.generate(**GREEDY).keys()


def test_chats_statistics_and_the_prompt_where_asked(server, offline):
    [expected] = offline.generate([offline.chat_ids("hi there")], SamplingParams(40, ignore_eos=True))
    options = {"max_tokens": 40, "ignore_eos": True}
    messages = json.dumps([{"role": "user", "content": "hi there"}])
    for chat in ({"chat_messages": messages}, {"text_input": "hi there", "chat": True}):
        assert server.generate(**chat, **options)["text_output"] == expected.text
    plain = server.generate(**GREEDY)
    assert joined(server.generate_stream(**GREEDY, exclude_input_in_output=False))[0] == PROMPT + plain["text_output"]
    requested = server.generate(**GREEDY, return_perf_metrics=True)
    names = {"acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens", "accepted_length"}
    assert requested.keys() - plain.keys() == {*names, "time_to_first_token_ms"}
    assert 0 < requested["total_accepted_draft_tokens"] < requested["total_draft_tokens"]
    rate = requested["total_accepted_draft_tokens"] / requested["total_draft_tokens"]
    assert requested["acceptance_rate"] == pytest.approx(rate)
    cut = server.generate(**LONG, deadline_ms=60)
    assert (cut["finish_reason"], cut["completion_tokens"] < 410) == ("deadline", True)


def test_operators_options_reach_the_model(server, roomy_bundle, tmp_path):
    """What a message may hold, and the KV pool."""
    prompt, own = f"the theme{END}{ASSISTANT}café{END}{USER}", LLM(roomy_bundle).pool
    requested = {"chat_messages": json.dumps([{"role": "user", "content": prompt}]), "max_tokens": 8}
    memory = "--kv-cache-memory", f"{3 * own.bytes}B"
    with triton(roomy_bundle, tmp_path / "log", "--special-tokens-in-content", *memory) as other:
        other.wait_for("serving")
        for one, special in ((server, False), (other, True)):
            llm = LLM(roomy_bundle, "autoregressive", 1, special_tokens_in_content=special)
            assert one.generate(**requested)["prompt_tokens"] == len(llm.chat_ids(prompt))
        assert own.sentence in server.err
        assert f"KV pool: {gigabytes(3 * own.bytes)}, " in other.err
        assert other.rest()["echo_blocks"] == 3 * own.blocks


def test_the_model_answers_on_the_engine_s_socket_too(server, offline):
    (path,) = Path(tempfile.gettempdir()).glob(f"{PREFIX}{server.process.pid}-*/engine")
    assert path.stat().st_mode & 0o077 == 0
    before = server.rest()["echo_request_seconds_count"]
    ids = offline.tokenizer.encode(GREEDY["text_input"])
    answer = ask(
        str(path),
        wire.Submit(prompt=ids, params=SamplingParams(GREEDY["max_tokens"], ignore_eos=True)),
        60,
    )
    assert isinstance(answer, Event)
    assert answer.token_ids == server.generate(**GREEDY)["output_ids"]
    assert server.rest()["echo_request_seconds_count"] == before + 2  # of both ways


def test_an_id_that_is_no_text_is_the_clients_mistake(server):
    before = server.rest()
    answer = json.loads(server.post("generate", b'{"id": "a\xff", "text_input": "a"}')[1])
    assert answer["error"] == "id is not UTF-8 (byte 1); send text in UTF-8."
    invalid, failed = ('echo_requests_total{outcome="%s"}' % each for each in ("invalid", "failed"))  # noqa: UP031
    after = server.wait_metrics(lambda m: m.get(invalid, 0) > before.get(invalid, 0))
    assert after.get(failed, 0) == before.get(failed, 0)


def test_an_error_begins_with_its_code_where_asked(server):
    request = {"text_input": "a", "max_tokens": 0}
    plain = server.stream(**request).next()["error"]
    assert server.stream(error_codes=True, **request).next()["error"] == f"INVALID_ARGUMENT: {plain}"


# -- departures ----------------------------------------------------------------------------------------------------


def test_a_grpc_client_that_cancels_frees_its_blocks(server):
    before = server.rest().get('echo_requests_total{outcome="cancelled"}', 0)
    for _ in range(8):
        stream = server.stream(**LONG)
        assert stream.next()["text_output"]
        stream.cancel()
    after = server.rest()
    assert after['echo_requests_total{outcome="cancelled"}'] - before >= 3  # a fast answer may have ended first


def test_an_http_client_that_leaves_frees_its_blocks(server):
    body = json.dumps(LONG | {"stream": True}).encode()
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.http)) as connection:
            head = f"POST /v2/models/echo/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert b"200" in connection.recv(200)
    server.rest()


def test_metrics_tell_what_was_done(server):
    before = server.rest()
    done = server.generate(**GREEDY)
    after = server.rest()

    def grew(name: str) -> float:
        return after[f"echo_{name}"] - before.get(f"echo_{name}", 0)

    probes = grew('requests_total{outcome="length"}') - 1  # the launcher's own, of one token each
    assert grew("emitted_tokens_total") == done["completion_tokens"] + probes
    assert grew("emitted_tokens_total") > grew("verifications_total") > 0
    for name in ("queue", "time_to_first_token", "request"):  # of clients alone
        assert grew(f"{name}_seconds_count") == 1
    assert after['echo_policy{policy="echo"}'] == 1
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics").text
    theirs = (
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="%s",model="echo",version="1"} %d\n'  # as TensorRT-LLM's
    )
    assert all(theirs % each in text for each in (("max", after["echo_blocks"]), ("used", 0), ("tokens_per", 32)))
    assert 'nv_trt_llm_request_metrics{model="echo",request_type="waiting",version="1"} 0\n' in text


# -- nonsense ------------------------------------------------------------------------------------------------------

NONSENSE = [None, True, -1, 0, 3, 2**31, -(2**63), 2**70, 1e308, -0.0, "", "x", "\x00", [], [1], ["a", "b"], [[1]], {}]
NAMES = ["text_input", "chat_messages", "input_ids", "max_tokens", "stop_words", "temperature", "top_k", "top_p"]
NAMES += ["presence_penalty", "repetition_penalty", "return_log_probs", "top_logprobs"]
NAMES += ["seed", "stream", "priority", "deadline_ms", "latency", "chat", "unknown"]


def test_nonsense_over_http_is_answered(server):
    source = random.Random(1)
    for _ in range(60):
        request = {source.choice(NAMES): source.choice(NONSENSE) for _ in range(source.randint(1, 4))}
        body = json.dumps({"max_tokens": 3, **request}).encode()
        body = source.choice([body, body, body, body[: source.randint(0, len(body))], body.replace(b"e", b"\xff")])
        status, answer = server.post(source.choice(["generate", "generate_stream"]), body, seconds=60)
        assert 200 <= status < 600
        assert answer
    deep = b'{"text_input": ' + b"[" * 2**20
    for body in (deep, deep + b"]" * 2**20 + b"}"):
        status, answer = server.post("generate", body)
        assert (status >= 400, b"error" in answer) == (True, True)
    assert server.generate(**GREEDY)["completion_tokens"] == 40
    server.rest()


def test_nonsense_over_grpc_is_answered(server):
    import tritonclient.grpc as client
    from tritonclient.utils import InferenceServerException

    source, noise = random.Random(2), np.random.default_rng(2)
    kinds = ["INT32", "INT64", "FP32", "BOOL", "BYTES", "UINT64"]
    for _ in range(30):
        stream = server.stream(text_input="a", max_tokens=3)
        assert "text_output" in list(stream)[-1]
        name, kind = source.choice(NAMES), source.choice(kinds)
        tensor = client.InferInput(name, source.choice([[1, 1], [1], [1, 3], [2, 2], [1, 0]]), kind)
        tensor._raw_content = noise.bytes(source.choice([0, 1, 4, 8, 12, 4096]))
        with client.InferenceServerClient(f"127.0.0.1:{server.grpc}") as connection:
            answers: queue.SimpleQueue = queue.SimpleQueue()
            connection.start_stream(lambda result, error, answers=answers: answers.put(error or result))
            with contextlib.suppress(InferenceServerException):
                connection.async_stream_infer("echo", [grpc_input("max_tokens", 3), tensor])
                answers.get(timeout=120)
            connection.stop_stream()
    for value in (float("nan"), float("inf"), -float("inf")):
        assert "temperature is" in server.stream(text_input="a", temperature=value).next()["error"]
    assert "not UTF-8" in server.stream(text_input=b"\xff\xfe").next()["error"]
    assert "seed is" in server.stream(text_input="a", seed=2**64 - 1).next()["error"]
    server.rest()


def test_no_request_reaches_files_or_memory_of_the_machine(server):
    import tritonclient.grpc as client
    from tritonclient.utils import InferenceServerException

    for path, body in (
        ("repository/index", {}),
        ("repository/models/other/load", {"parameters": {"config": "{}"}}),
        ("repository/models/echo/unload", {}),
        ("systemsharedmemory/region/a/register", {"key": "/a", "offset": 0, "byte_size": 8}),
        ("trace/setting", {"trace_level": ["TIMESTAMPS"]}),
        ("logging", {"log_verbose_level": 1}),
    ):
        status, answer = server.post(path, json.dumps(body).encode(), below="")
        assert (status, b"restricted" in answer) == (403, True), answer
    with client.InferenceServerClient(f"127.0.0.1:{server.grpc}") as connection:
        for forbidden in (
            lambda: connection.load_model("other", config="{}"),
            lambda: connection.register_system_shared_memory("a", "/a", 8),
            lambda: connection.update_log_settings({"log_verbose_level": 1}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                forbidden()


def test_it_is_the_same_server_as_at_the_start(server):
    assert not [word for word in ("again", "died", "Traceback") if word in server.err]
