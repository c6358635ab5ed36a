"""The real Triton, asked as its clients ask: text, streams, statistics, refusals, departures, crowds and nonsense."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pairs import ASSISTANT, END, USER
from served import joined, joined_lists, needs_triton, triton

from echo_trt.adapters.triton.server import PREFIX
from echo_trt.engine.host_memory import gigabytes
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, SamplingParams
from echo_trt.engine.process import wire
from echo_trt.engine.service.protocol import FIRST

pytestmark = needs_triton
TRITON = True
QUEUE, LONG = 6, 440
SERVE = ("--queue", QUEUE)
PROMPT = "the theme of a thing, "
WAYS = {
    "greedy": {"max_tokens": 40, "ignore_eos": True},
    "seeded": {"max_tokens": 40, "ignore_eos": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 2**40 + 7},
    "penalised": {
        "max_tokens": 40,
        "ignore_eos": True,
        "temperature": 0.9,
        "seed": 3,
        "presence_penalty": -0.7,
        "frequency_penalty": 1.1,
        "repetition_penalty": 1.3,
    },
    "stopped": {"max_tokens": 40, "temperature": 1.3, "seed": 5, "stop_words": ["e", "th", "\u00e9"]},
}


@pytest.fixture(scope="module")
def offline(roomy_bundle) -> LLM:
    return LLM(roomy_bundle, "autoregressive", 1)


def params(way: dict) -> SamplingParams:
    named = {("stop" if key == "stop_words" else key): value for key, value in way.items()}
    return SamplingParams(**{**named, "stop": tuple(named.get("stop", ()))})


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_text_by_every_road(way, server, offline):
    ids = offline.tokenizer(PROMPT)["input_ids"]
    expected = offline.generate([ids], params(way))[0]
    whole = server.generate(text_input=PROMPT, **way)
    assert (whole["text_output"], whole["finish_reason"]) == (expected.text, expected.finish_reason)
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (len(ids), len(expected.token_ids))
    for pieces in (
        server.generate_stream(text_input=PROMPT, **way),
        server.generate_stream(input_ids=ids, **way),
        list(server.stream(text_input=PROMPT, **way)),
        list(server.stream(input_ids=ids, **way)),
        list(server.stream(input_ids=ids, **way | {"stream": False})),
    ):
        assert joined(pieces) == (expected.text, expected.token_ids)
        assert pieces[-1]["finish_reason"] == expected.finish_reason
        assert all("finish_reason" not in piece for piece in pieces[:-1])
    assert len(server.generate_stream(text_input=PROMPT, **way)) > 1


def test_the_model_answers_on_the_engine_s_socket_too(server):
    (path,) = Path(tempfile.gettempdir()).glob(f"{PREFIX}{server.process.pid}-*/engine")
    assert path.stat().st_mode & 0o077 == 0
    before = server.rest()["echo_request_seconds_count"]
    answer = wire.ask(str(path), wire.Submit(1, {"text_input": PROMPT, **WAYS["greedy"]}), 60)
    assert isinstance(answer, wire.TextPiece)
    assert answer.text == server.generate(text_input=PROMPT, **WAYS["greedy"])["text_output"]
    assert server.rest()["echo_request_seconds_count"] == before + 2  # of both ways


def test_chat_goes_through_the_template(server, offline):
    expected = offline.generate([offline.chat_ids("hi there")], params(WAYS["greedy"]))[0].text
    messages = json.dumps([{"role": "user", "content": "hi there"}])
    assert server.generate(chat_messages=messages, **WAYS["greedy"])["text_output"] == expected
    tools = [{"type": "function", "function": {"name": "f"}}]
    ids = offline.chat_ids("hi", tools)  # as text, since the template has no place for them
    hi = '[{"role": "user", "content": "hi"}]'
    reported = server.generate(chat_messages=hi, tools=json.dumps(tools), **WAYS["greedy"] | {"max_tokens": 1})
    assert reported["prompt_tokens"] == len(ids) > len(offline.chat_ids("hi"))
    assert server.generate(text_input="hi there", chat=True, **WAYS["greedy"])["text_output"] == expected
    assert server.generate(text_input="hi there", **WAYS["greedy"])["text_output"] != expected


def test_the_prompt_is_part_of_the_output_where_asked(server):
    plain = server.generate(text_input=PROMPT, **WAYS["greedy"])["text_output"]
    assert server.generate(text_input=PROMPT, exclude_input_in_output=False, **WAYS["greedy"])["text_output"] == (
        PROMPT + plain
    )
    pieces = server.generate_stream(text_input=PROMPT, exclude_input_in_output=False, **WAYS["greedy"])
    assert joined(pieces)[0] == PROMPT + plain


def test_statistics_where_asked(server):
    plain = server.generate(text_input=PROMPT, **WAYS["greedy"])
    requested = server.generate(text_input=PROMPT, return_perf_metrics=True, **WAYS["greedy"])
    assert requested.keys() - plain.keys() == {
        "acceptance_rate",
        "total_accepted_draft_tokens",
        "total_draft_tokens",
        "accepted_length",
        "time_to_first_token_ms",
    }
    assert 0 < requested["total_accepted_draft_tokens"] < requested["total_draft_tokens"]
    rate = requested["total_accepted_draft_tokens"] / requested["total_draft_tokens"]
    assert requested["acceptance_rate"] == pytest.approx(rate)
    assert requested["accepted_length"] > 1 < requested["time_to_first_token_ms"] + 1


@pytest.mark.parametrize("way", ["penalised", "stopped"])
def test_logprobs_where_asked(way, server, offline):
    request = {"text_input": PROMPT, **WAYS[way], "return_log_probs": True, "top_logprobs": 3}
    answer = offline.generate([offline.tokenizer(PROMPT)["input_ids"]], replace(params(WAYS[way]), logprobs=3))[0]
    wanted = [entry.logprob for entry in answer.logprobs]
    for pieces in (
        [server.generate(**request)],
        server.generate_stream(**request),
        list(server.stream(**request)),
    ):
        assert joined(pieces) == (answer.text, answer.token_ids)
        assert joined_lists(pieces, "output_log_probs") == pytest.approx(wanted, abs=1e-4)
        assert pieces[-1]["cum_log_probs"] == pytest.approx(sum(wanted), abs=1e-3)
        entries = [entry for piece in pieces for entry in json.loads(piece["logprobs"])]
        assert_entries(entries, answer, offline.tokenizer.added_tokens_decoder)
    assert "output_log_probs" not in server.generate(text_input=PROMPT, **WAYS[way])


@pytest.mark.parametrize("way", ["greedy", "stopped"])
def test_sources_where_asked(way, server, offline):
    request = {"text_input": PROMPT, **WAYS[way], "token_sources": True}
    answer = offline.generate([offline.tokenizer(PROMPT)["input_ids"]], params(WAYS[way]))[0]
    for pieces in ([server.generate(**request)], server.generate_stream(**request), list(server.stream(**request))):
        entries = [entry for piece in pieces for entry in json.loads(piece["token_sources"])]
        output = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
        assert output == answer.text or (answer.finish_reason == "stop" and output.startswith(answer.text))
        assert {entry["source"] for entry in entries} > {"target"}
        assert {entry["probability"] is None for entry in entries if entry["source"] == "target"} == {True}
    plain = server.generate(**request, speculate=False)
    assert plain["text_output"] == answer.text
    assert {entry["source"] for entry in json.loads(plain["token_sources"])} == {"target"}
    assert "token_sources" not in server.generate(text_input=PROMPT, **WAYS[way])


def assert_entries(entries: list[dict], answer: Completion, special: Container[int]) -> None:
    """They are those of the text's tokens: nothing that a stop string cut off, no special token."""
    output = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    assert output.startswith(answer.text)
    assert output == answer.text or answer.finish_reason == "stop"
    visible = [each for each in answer.logprobs if each.token not in special]
    for entry, each in zip(entries, visible, strict=False):
        assert entry["logprob"] == pytest.approx(each.logprob, abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx([p for _, p in each.top], abs=1e-4)
        if "\\x" not in entry["token"]:
            at = answer.text[entry["text_offset"] :]  # a stop string may begin inside the last token
            assert at.startswith(entry["token"]) or entry["token"].startswith(at)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"max_tokens": 3}, "no prompt given"),
        ({"text_input": "a", "input_ids": [5]}, "input_ids and text_input given"),
        ({"input_ids": [5, 999]}, "token id 999"),
        ({"text_input": ""}, "empty"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "a", "max_tokens": -1}, "max_tokens is -1"),
        ({"text_input": "a", "max_tokens": -1, "min_length": 2}, "max_tokens is -1"),
        ({"text_input": "a", "temperature": -1.5}, "temperature is -1.5"),
        ({"text_input": "a", "top_p": 1.5}, "top_p is 1.5"),
        ({"text_input": "a", "presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"text_input": "a", "frequency_penalty": -3.0}, "frequency_penalty is -3.0"),
        ({"text_input": "a", "repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"text_input": "a", "return_log_probs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"text_input": "a", "logit_bias_ids": [5, 6], "logit_bias": [1.5]}, "logit_bias_ids has 2 values"),
        ({"text_input": "a", "logit_bias_ids": [999], "logit_bias": [1.5]}, "token id 999"),
        ({"text_input": "a", "min_length": 300}, "min_length is 300"),
        ({"text_input": "a", "top_logprobs": 5}, "return_log_probs is not true"),
        ({"text_input": "a", "deadline_ms": -4}, "deadline_ms is -4"),
        ({"text_input": "word " * 2000}, "shorten it"),
        ({"text_input": "word " * 200_000}, "shorten it"),
        ({"text_input": "a", "stop_words": ["x"] * 65}, "stop_words has 65"),
        ({"chat_messages": "{"}, "not JSON"),
        ({"chat_messages": "[]"}, "no list of messages"),
        ({"chat_messages": '[{"role": "user"}]'}, "chat_messages[0]"),
        ({"chat_messages": '[{"role": "user", "content": "\\ud800"}]'}, "chat_messages[0]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_answered_in_a_sentence(request_, words, server):
    for answer in (server.generate(**request_), server.stream(**request_).next()):
        assert words in answer["error"], answer
        assert answer["error"].endswith(".")


def test_an_id_that_is_no_text_is_the_clients_mistake(server):
    before = server.rest()
    answer = json.loads(server.post("generate", b'{"id": "a\xff", "text_input": "a"}')[1])
    assert answer["error"] == "id is not UTF-8 (byte 1); send text in UTF-8."
    invalid, failed = ('echo_requests_total{outcome="%s"}' % each for each in ("invalid", "failed"))  # noqa: UP031
    after = server.wait_metrics(lambda m: m[invalid] > before.get(invalid, 0))
    assert after.get(failed, 0) == before.get(failed, 0)


def test_an_error_begins_with_its_code_where_asked(server):
    request = {"text_input": "a", "max_tokens": 0}
    plain = server.stream(**request).next()["error"]
    assert server.stream(error_codes=True, **request).next()["error"] == f"INVALID_ARGUMENT: {plain}"


def test_a_deadline_ends_an_answer(server):
    cut = server.generate(text_input=PROMPT, max_tokens=LONG, ignore_eos=True, deadline_ms=60)
    assert cut["finish_reason"] == "deadline"
    assert cut["completion_tokens"] < LONG - 30


# -- departures and crowds -----------------------------------------------------------------------------------------


def test_a_grpc_client_that_cancels_frees_its_blocks(server):
    before = server.rest().get('echo_requests_total{outcome="cancelled"}', 0)
    for _ in range(16):
        stream = server.stream(text_input=PROMPT, max_tokens=LONG, ignore_eos=True)
        assert stream.next()["text_output"]
        stream.cancel()
    after = server.rest()
    assert after['echo_requests_total{outcome="cancelled"}'] - before >= 6  # a fast answer may have ended first


def test_an_http_client_that_leaves_frees_its_blocks(server):
    server.rest()
    body = json.dumps({"text_input": PROMPT, "max_tokens": LONG, "ignore_eos": True, "stream": True}).encode()
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", server.http)) as connection:
            head = f"POST /v2/models/echo/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert b"200" in connection.recv(200)
    server.rest()


def test_a_full_queue_refuses_and_the_others_finish(server):
    server.rest()
    with ThreadPoolExecutor(24) as pool:
        ask = lambda i: server.generate(text_input=PROMPT, max_tokens=LONG, ignore_eos=True)  # noqa: E731
        answers = list(pool.map(ask, range(24)))
    refused = [answer for answer in answers if "error" in answer]
    assert all("queue is full" in answer["error"] for answer in refused)
    finished = {answer["text_output"] for answer in answers if "error" not in answer}
    assert len(finished) == 1
    assert QUEUE < len(answers) - len(refused) < len(answers)
    assert server.rest()['echo_requests_total{outcome="refused"}'] >= len(refused)


def test_a_probe_waits_for_no_place(server):
    server.rest()
    long = {"text_input": PROMPT, "max_tokens": LONG, "ignore_eos": True}
    streams = [server.stream(**long) for _ in range(4)]
    for stream in streams:
        stream.next()
    waiting = [server.stream(**long) for _ in range(QUEUE)]
    probe = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}
    assert "output_ids" in server.generate(**probe)
    # One may find the place of an answer that has just ended.
    assert "busy" in {list(server.stream(**probe))[-1]["finish_reason"] for _ in range(5)}
    for stream in (*streams, *waiting):
        assert list(stream)[-1]["completion_tokens"] == LONG


def test_metrics_tell_what_was_done(server):
    before = server.rest()
    done = server.generate(text_input=PROMPT, **WAYS["greedy"])
    after = server.rest()

    def grew(name: str) -> float:
        return after[f"echo_{name}"] - before.get(f"echo_{name}", 0)

    probes = grew('requests_total{outcome="length"}') - 1  # the launcher's own, of one token each
    assert probes >= 0
    assert grew("emitted_tokens_total") == done["completion_tokens"] + probes
    assert grew("prompt_tokens_total") >= done["prompt_tokens"] - 1
    for name in ("queue", "time_to_first_token", "request"):  # of clients alone
        assert grew(f"{name}_seconds_count") == 1
    assert grew("inter_token_seconds_count") > 0
    assert after['echo_policy{policy="echo"}'] == 1
    assert grew("emitted_tokens_total") > grew("verifications_total") > 0
    assert after["echo_accepted_length"] >= 1  # 1 where a probe came last


def test_a_conversation_is_found_again_and_the_metrics_tell(server, offline):
    """The second turn computes what is new. Blocks that are only kept are not counted as used."""
    first_turn = np.random.default_rng(5).integers(3, 300, 60).tolist()
    before = server.rest()
    first = server.generate(input_ids=first_turn, max_tokens=45, ignore_eos=True)
    between = server.rest()
    second_turn = [*first_turn, *first["output_ids"], 7, 8, 9]
    second = server.generate(input_ids=second_turn, max_tokens=20, ignore_eos=True)
    after = server.rest()
    assert second["output_ids"] == offline.generate([second_turn], SamplingParams(20, ignore_eos=True))[0].token_ids

    def grew(name: str) -> tuple[float, float]:
        turns = [figures[f"echo_{name}_total"] for figures in (before, between, after)]
        return turns[1] - turns[0], turns[2] - turns[1]

    assert (first["cached_tokens"], second["cached_tokens"]) == (0, 96)
    found, requested, computed = grew("cached_tokens"), grew("asked_tokens"), grew("prompt_tokens")
    assert found == (0, 96)
    # The launcher's own question, of one token, may have been asked and not yet computed when figures were read.
    assert all(abs(requested[i] - computed[i] - found[i]) <= 1 for i in range(2))
    assert 12 <= computed[1] < 20  # the launcher asks now and then whether the server lives
    assert between["echo_blocks_cached"] >= before["echo_blocks_cached"] + 3
    assert after["echo_blocks_used"] == 0


def test_it_is_the_same_server_as_at_the_start(server):
    assert "again" not in server.err
    assert "died" not in server.err
    assert "Traceback" not in server.err


def test_an_operator_may_let_messages_hold_control_tokens(server, roomy_bundle, tmp_path):
    prompt = f"the theme{END}{ASSISTANT}café{END}{USER}"
    requested = {"chat_messages": json.dumps([{"role": "user", "content": prompt}]), "max_tokens": 8}
    trusting = triton(roomy_bundle, tmp_path / "log", "--policy", "autoregressive", "--special-tokens-in-content")
    try:
        trusting.wait_for("serving")
        for one, special in ((server, False), (trusting, True)):
            llm = LLM(roomy_bundle, "autoregressive", 1, special_tokens_in_content=special)
            assert one.generate(**requested)["prompt_tokens"] == len(llm.chat_ids(prompt))
    finally:
        trusting.kill()


def test_the_kv_pool_is_told_and_may_be_chosen(server, roomy_bundle, tmp_path):
    own = LLM(roomy_bundle).pool
    assert own.sentence in server.err
    chosen = triton(roomy_bundle, tmp_path / "log", "--kv-cache-memory", f"{3 * own.bytes}B")
    try:
        chosen.wait_for("serving")
        assert f"KV pool: {gigabytes(3 * own.bytes)}, " in chosen.err
        assert chosen.rest()["echo_blocks"] == 3 * own.blocks
    finally:
        chosen.kill()
