"""Echoed prompts and their log-probabilities over HTTP, before the real Triton: places in the text, early ends."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from gateway.running import client_of, refused
from pairs import USER
from serving.served import needs_triton

from echo_trt.models.tokenizer import load_tokenizer

pytestmark = needs_triton
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
        told, text = choice["logprobs"], choice["text"]
        assert told["text_offset"] == sorted(told["text_offset"])
        readable = [
            (token, at) for token, at in zip(told["tokens"], told["text_offset"], strict=True) if "\\x" not in token
        ]
        assert len(readable) >= 2
        for token, at in readable:
            if token == USER and isinstance(prompt, list):
                assert (at, text.startswith("the theme")) == (0, True)
            else:
                assert text.startswith(token, at)


@pytest.mark.parametrize("asked", [{"logprobs": None, "echo": False}, {"logprobs": None}, {"echo": False}, {}])
def test_a_deadline_within_the_prompt_is_504(asked, client):
    """The prompt's 94 iterations take more than a millisecond."""
    body = {**ASKED, "prompt": [70, 71] * 750, "deadline_ms": 1, **asked}
    assert "deadline" in refused(client.post("/v1/completions", json=body), 504)
