"""Echoed prompts and log-probabilities over HTTP: places, early ends, the bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from asking import ask
from byte_tokenizer import USER
from server.running import client_of, refused

from echo_trt.engine import params
from echo_trt.engine.params import MAX_ANSWER_LOGPROBS, MAX_PROMPT_LOGPROBS, SamplingParams
from echo_trt.engine.process import wire
from echo_trt.models.tokenizer import load_tokenizer

ASKED = {"model": "echo", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "echo": True, "logprobs": 1}


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(long_bundle):
    return load_tokenizer(long_bundle)


def test_offsets_are_places_in_the_text_that_comes_back(client, tokenizer):
    """Special tokens among ids are no text; names that a client writes are. Bytes that are no character count one."""
    user = tokenizer.backend_tokenizer.token_to_id(USER)
    cut = tokenizer.encode("a😀b")
    for prompt in ([user, *tokenizer.encode("the theme")], f"the{USER}naïve 😀 theme", cut[:-2] + cut[-1:]):
        choice = client.post("/v1/completions", json={**ASKED, "prompt": prompt}).json()["choices"][0]
        reported, text = choice["logprobs"], choice["text"]
        assert reported["text_offset"] == sorted(reported["text_offset"])
        readable = [
            (token, at)
            for token, at in zip(reported["tokens"], reported["text_offset"], strict=True)
            if "\\x" not in token
        ]
        assert len(readable) >= 2
        for token, at in readable:
            if token == USER and isinstance(prompt, list):
                assert (at, text.startswith("the theme")) == (0, True)
            else:
                assert text.startswith(token, at)


@pytest.mark.parametrize("prompt", ["the theme of it", [70, 71, 72]])
def test_without_new_tokens_the_prompt_is_scored(client, prompt):
    body = {**ASKED, "prompt": [prompt, "another"], "logprobs": 2}
    asked, scored = (client.post("/v1/completions", json=body | {"max_tokens": most}).json() for most in (1, 0))
    for whole, alone in zip(asked["choices"], scored["choices"], strict=True):
        assert whole["text"].startswith(alone["text"])
        size = len(whole["logprobs"]["tokens"]) - 1
        assert {name: each[:size] for name, each in whole["logprobs"].items()} == alone["logprobs"]
    assert scored["usage"]["completion_tokens"] == 0
    assert scored["usage"]["prompt_tokens"] == asked["usage"]["prompt_tokens"]
    stream = client.post("/v1/completions", json=body | {"max_tokens": 0, "stream": True}).text
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in stream.splitlines() if line.startswith("data: {")]
    assert sorted(texts) == sorted(choice["text"] for choice in scored["choices"])
    for other in ({"echo": False}, {"logprobs": None}):
        refused(client.post("/v1/completions", json=body | {"max_tokens": 0} | other), 400, "max_tokens")


@pytest.mark.parametrize("requested", [{"logprobs": None, "echo": False}, {"logprobs": None}, {"echo": False}, {}])
def test_a_deadline_within_the_prompt_is_504(requested, client):
    """The prompt's 94 iterations take more than a millisecond."""
    body = {**ASKED, "prompt": [70, 71] * 750, "deadline_ms": 1, **requested}
    assert "deadline" in refused(client.post("/v1/completions", json=body), 504)


@pytest.mark.parametrize(
    ("prompt", "n", "logprobs"),
    [([70] * 1500, 60, 20), ([[70] * 1500] * 60, 1, 20), ("the theme " * 150, 32, 20), ([70] * 1500, 64, 1)],
)
def test_too_many_log_probabilities_of_prompts_are_refused_by_their_product(prompt, n, logprobs, client, tokenizer):
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    tokens = sum(len(tokenizer.encode(each) if isinstance(each, str) else each) for each in prompts)
    body = {**ASKED, "prompt": prompt, "n": n, "logprobs": logprobs, "max_tokens": 1}
    message = refused(client.post("/v1/completions", json=body), 400, "logprobs")
    assert f"{tokens} prompt tokens x n = {n} x {logprobs + 1} = {tokens * n * (logprobs + 1)} " in message
    assert str(MAX_PROMPT_LOGPROBS) in message
    assert client.post("/v1/completions", json={**body, "max_tokens": 1, "echo": False, "n": 1}).status_code == 200


def test_a_text_of_more_bytes_than_tokens_is_counted_by_its_tokens(client, tokenizer):
    prompt = "the theme of a thing, " * 40
    tokens, n = len(tokenizer.encode(prompt)), 12
    assert tokens * n * 21 <= MAX_PROMPT_LOGPROBS < len(prompt) * n * 21
    answer = client.post("/v1/completions", json={**ASKED, "prompt": prompt, "n": n, "logprobs": 20}).json()
    assert {choice["text"].startswith(prompt) for choice in answer["choices"]} == {True}


def test_the_engine_has_this_bound_itself(server):
    asked = SamplingParams(max_tokens=1, prompt_logprobs=20)
    reported = ask(str(server.engine), wire.Submit(prompt=[70] * 5000, params=asked))
    assert "prompt_logprobs is 20, which asks for 5000 prompt tokens" in reported.message


@pytest.mark.parametrize(("n", "top", "sources"), [(128, 0, False), (6, 20, False), (64, 0, True)])
def test_too_many_log_probabilities_of_answers_are_refused_by_their_product(n, top, sources, client):
    """Without a limit of tokens the bound is the limit."""
    entries = top + 1 + sources
    tokens = MAX_ANSWER_LOGPROBS // (n * entries)
    chat = {"model": "echo", "messages": [{"role": "user", "content": "the theme"}], "n": n, "token_sources": sources}
    chat |= {"logprobs": True, "top_logprobs": top, "deadline_ms": 1}
    for field in ("max_tokens", "max_completion_tokens"):
        message = refused(client.post("/v1/chat/completions", json={**chat, field: tokens + 1}), 400, field)
        assert f"{tokens + 1} tokens x {n} choices x {entries} = {(tokens + 1) * n * entries} " in message
    for limit in ({"max_tokens": tokens}, {}):
        assert "deadline" in refused(client.post("/v1/chat/completions", json={**chat, **limit}), 504)


def test_the_engine_bounds_log_probabilities_of_answers_itself(server, monkeypatch):
    monkeypatch.setattr(params, "MAX_ANSWER_LOGPROBS", 1000)
    asked = SamplingParams(max_tokens=101, logprobs=9)
    reported = ask(str(server.engine), wire.Submit(prompt=[70] * 5, params=asked), 30)
    assert "max_tokens is 101, which allows 101 tokens x 1 choices x 10 = 1010 log-probabilities" in reported.message
    assert reported.field == "max_tokens"
