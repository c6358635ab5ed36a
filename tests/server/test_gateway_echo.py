"""Echoed prompts and their log-probabilities over HTTP: places, early ends, the bound."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from asking import ask
from byte_tokenizer import USER
from server.running import client_of, refused

from echo_trt.engine.params import MAX_PROMPT_LOGPROBS
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
    user = tokenizer.convert_tokens_to_ids(USER)
    cut = tokenizer("a😀b")["input_ids"]
    for prompt in ([user, *tokenizer("the theme")["input_ids"]], f"the{USER}naïve 😀 theme", cut[:-2] + cut[-1:]):
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
    tokens = sum(len(tokenizer(each)["input_ids"] if isinstance(each, str) else each) for each in prompts)
    body = {**ASKED, "prompt": prompt, "n": n, "logprobs": logprobs, "max_tokens": 1}
    message = refused(client.post("/v1/completions", json=body), 400, "logprobs")
    assert f"{tokens} prompt tokens x n = {n} x {logprobs + 1} = {tokens * n * (logprobs + 1)} " in message
    assert str(MAX_PROMPT_LOGPROBS) in message
    assert client.post("/v1/completions", json={**body, "max_tokens": 1, "echo": False, "n": 1}).status_code == 200


def test_a_text_of_more_bytes_than_tokens_is_counted_by_its_tokens(client, tokenizer):
    prompt = "the theme of a thing, " * 40
    tokens, n = len(tokenizer(prompt)["input_ids"]), 12
    assert tokens * n * 21 <= MAX_PROMPT_LOGPROBS < len(prompt) * n * 21
    answer = client.post("/v1/completions", json={**ASKED, "prompt": prompt, "n": n, "logprobs": 20}).json()
    assert {choice["text"].startswith(prompt) for choice in answer["choices"]} == {True}


def test_the_engine_has_this_bound_itself(server):
    inputs = {"input_ids": [70] * 5000, "prompt_logprobs": 20, "max_tokens": 1}
    reported = ask(str(server.engine), wire.Submit(1, inputs))
    assert "prompt_logprobs is 20, which asks for 5000 prompt tokens" in reported.message
