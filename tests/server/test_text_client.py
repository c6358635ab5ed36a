"""Prompts and texts at the door: token ids on the socket, stop strings found here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from driving import prompt_ids
from server.running import engine_of

from echo_trt import LLM, SamplingParams
from echo_trt.engine.process.client import EngineError
from echo_trt.engine.process.wire import Submit
from echo_trt.engine.text.prompts import ChatPrompt
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.server import text_client
from echo_trt.server.text_client import Question, TextClient, TextPiece


@pytest.fixture(scope="module")
def path(bundle_of) -> Iterator[Path]:
    with engine_of(bundle_of("close")) as path:
        yield path


def ask(path: Path, prompt: Any, streamed: bool = False, echoes: bool = False, **params: Any) -> list[TextPiece]:
    async def asked() -> list[TextPiece]:
        client = TextClient(path)
        given = SamplingParams(**{"max_tokens": 60, "ignore_eos": True} | params)
        submit = Submit(prompt=[], params=given, streamed=streamed)
        try:
            return [piece async for piece in client.answer(Question(prompt, submit, echoes))]
        finally:
            await client.close()

    return asyncio.run(asked())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_text_is_the_offline_one(path, bundle_of, streamed):
    prompt = prompt_ids(9, 1)
    [expected] = LLM(bundle_of("close")).generate([prompt], SamplingParams(60, ignore_eos=True))
    pieces = ask(path, prompt, streamed)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    last = pieces[-1]
    assert (last.finish_reason, last.completion_tokens, last.prompt_tokens) == ("length", 60, 9)
    assert streamed == (len(pieces) > 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_an_answer_where_it_begins(path, streamed):
    """The engine hears of it, and what it has emitted meanwhile was never said."""
    whole = "".join(piece.text for piece in ask(path, "the theme"))
    stop = whole[20:23]
    pieces = ask(path, "the theme", streamed, stop=(stop,), logprobs=1, token_sources=True)
    text, last = "".join(piece.text for piece in pieces), pieces[-1]
    assert text == whole[: whole.index(stop)]
    assert (last.finish_reason, last.stop_string) == ("stop", stop)
    assert last.completion_tokens == sum(len(piece.token_ids) for piece in pieces) < 60
    entries = [entry.token for piece in pieces for entry in piece.logprobs]
    assert entries == [entry.token for piece in pieces for entry in piece.sources]
    assert len(entries) <= last.completion_tokens


def test_what_is_known_of_calls_goes_to_the_engine_in_tokens(path, bundle_of):
    calls, encode = (("the theme", "a thing"), ("the",)), load_tokenizer(bundle_of("close")).encode
    wanted = [[encode(part, add_special_tokens=False) for part in each] for each in calls]

    async def asked() -> Submit:
        client, submit = TextClient(path), Submit(prompt=[], params=SamplingParams(4, ignore_eos=True))
        prompt = ChatPrompt([{"role": "user", "content": "the theme"}], calls=calls)
        try:
            assert [piece async for piece in client.answer(Question(prompt, submit))][-1].completion_tokens == 4
        finally:
            await client.close()
        return submit

    assert asyncio.run(asked()).calls == wanted


def test_an_echoed_prompt_precedes_the_answer(path):
    [piece] = ask(path, "the theme", echoes=True, prompt_logprobs=1, max_tokens=2)
    assert piece.text.startswith("the theme")
    assert piece.logprobs[0].logprob is None
    assert b"".join(entry.token for entry in piece.logprobs).startswith(b"the theme")


@pytest.mark.parametrize(
    ("prompt", "kind", "field", "word"),
    [
        ("word " * 2000, "too_long", "prompt", "shorten it"),
        ("", "invalid", "prompt", "empty"),
        ([5, 999], "invalid", "prompt", "token id 999"),
        (ChatPrompt([]), "invalid", None, "no list of messages"),
        (ChatPrompt([{"role": "user"}]), "invalid", None, "messages[0]"),
        (ChatPrompt([{"role": "user", "content": "word " * 2000}]), "too_long", "prompt", "shorten it"),
    ],
)
def test_a_prompt_that_cannot_be_taken_is_a_failure(path, prompt, kind, field, word):
    with pytest.raises(EngineError) as error:
        ask(path, prompt)
    failure = error.value.failure
    assert (failure.kind, failure.field, word in failure.message) == (kind, field, True), failure


def test_tokens_and_texts_are_read_both_ways(path):
    async def both() -> None:
        client = TextClient(path)
        tokens = await client.token_ids("the theme")
        assert await client.text(tokens) == "the theme"
        for wrong, kind in (([999], "invalid"), ([5] * 2000, "too_long")):
            with pytest.raises(EngineError) as error:
                await client.text(wrong)
            assert (error.value.failure.kind, error.value.failure.field) == (kind, "tokens")
        await client.close()

    asyncio.run(both())


def test_prompts_that_come_together_load_the_tokenizer_once(path, monkeypatch):
    made = []
    load = text_client.PromptReader
    monkeypatch.setattr(text_client, "PromptReader", lambda *given: made.append(1) or load(*given))

    async def crowd() -> None:
        client = TextClient(path)
        assert len(set(map(tuple, await asyncio.gather(*(client.token_ids("the theme") for _ in range(9)))))) == 1
        await client.close()

    asyncio.run(crowd())
    assert made == [1]
