"""The tokens and the rate of a server of OpenAI's completions, in each of the ways in which servers count them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from refusal import refused
from server.running import running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from echo_trt.models.tokenizer import BundleTokenizer
from echo_trt_lab.benchmark.peer_openai import OpenAIPeer, Server, _CompletionStream

PIECES = ["The", " sky", "", " is", " blue"]  # the third token ends inside a character
TOKENS = len(PIECES)


def events(way: str, prompt: int, rate: float | None) -> list[dict[str, Any]]:
    """Return one completion as servers stream it; ``way`` is where they count its tokens."""

    def choice(text: str, reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}

    def usage(tokens: int) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": prompt, "completion_tokens": tokens}}

    timings = {"timings": {"predicted_n": TOKENS, "predicted_per_second": rate}} if rate else {}
    texts = [choice(text) for text in PIECES]
    if way == "llama.cpp":  # in the last event, which has a choice without text
        return [*texts, choice("", "length") | usage(TOKENS) | timings]
    if way == "its text":  # in the last event, which has text
        return [*texts[:-1], choice(PIECES[-1], "length") | usage(TOKENS)]
    if way == "running":  # vLLM with continuous_usage_stats
        return [text | usage(i) for i, text in enumerate(texts, 1)]
    if way == "two counts":  # now and then
        return [*texts[:2], texts[2] | usage(3), *texts[3:], {"choices": []} | usage(TOKENS)]
    return [*texts, {"choices": []} | usage(TOKENS)]  # OpenAI's own way: in an event of its own


def application(way: str, rate: float | None = None) -> Starlette:
    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "target"}]})

    async def complete(request: Request) -> StreamingResponse:
        prompt = len((await request.json())["prompt"])

        def lines() -> Iterator[str]:
            yield from (f"data: {json.dumps(event)}\n\n" for event in events(way, prompt, rate))
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])])


@pytest.fixture(scope="module")
def tokenizer() -> BundleTokenizer:
    return BundleTokenizer(byte_tokenizer(), {})


@pytest.mark.parametrize("way", ["llama.cpp", "its text", "running", "two counts", "usage alone"])
def test_every_token_is_counted_once(way, tokenizer):
    with running(application(way)) as door:
        found = OpenAIPeer(Server.parse(f"peer={door.base_url}"), tokenizer).run([[5, 6, 7]], 1, TOKENS)
    assert found.answers == ["".join(PIECES)]
    assert found.whole.tokens == pytest.approx(TOKENS)
    assert found.decode.tokens < TOKENS  # without the first arrival
    assert found.reported == []


@pytest.mark.parametrize("way", ["llama.cpp", "its text", "running", "two counts", "usage alone"])
def test_tokens_arrive_with_their_text(way):
    lines = [(float(i), f"data: {json.dumps(event)}") for i, event in enumerate(events(way, 3, None), 1)]
    found = _CompletionStream.read(0, 0.0, lines).arrivals(3)
    counted = {"running": [1, 1, 1, 1, 1], "two counts": [3 * 3 / 7, 3 * 4 / 7, 2 * 3 / 8, 2 * 5 / 8]}
    spread = [TOKENS * len(text) / len("".join(PIECES)) for text in PIECES if text]
    assert found.tokens == pytest.approx(counted.get(way, spread))
    assert found.times == ([1, 2, 3, 4, 5] if way == "running" else [1, 2, 4, 5])


def test_a_server_whose_own_timings_say_another_rate_is_refused(tokenizer):
    with running(application("llama.cpp", rate=1e-3)) as door:
        peer = OpenAIPeer(Server.parse(f"peer={door.base_url}"), tokenizer)
        with refused("peer peer", "tokens/s as they arrive, and 0.0 by the server's own timings", "end what else runs"):
            peer.run([[5, 6, 7]], 1, TOKENS)


@pytest.mark.parametrize(("rate", "agrees"), [(0.95, True), (0.5, False), (2.0, False)])
def test_rates_agree_up_to_a_tenth(rate, agrees, tokenizer):
    """Five tokens from second 1 to 5, one a second."""
    lines = [(float(i), f"data: {json.dumps(event)}") for i, event in enumerate(events("llama.cpp", 3, rate), 1)]
    stream = _CompletionStream.read(0, 0.0, lines)
    assert stream.rate == rate
    with running(application("llama.cpp")) as door:
        peer = OpenAIPeer(Server.parse(f"peer={door.base_url}"), tokenizer)
    if agrees:
        return peer._compare([stream], [stream.arrivals(3)])
    with refused("1.0 tokens/s as they arrive", f"{rate} by the server's own timings"):
        peer._compare([stream], [stream.arrivals(3)])
