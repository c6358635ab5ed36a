"""Any server of OpenAI's completions as a peer: vLLM, TensorRT-LLM, SGLang, llama.cpp, or ours.

It gets the token ids of our prompts, or their text where it takes no ids, and its answers are measured as their tokens
arrive, HTTP included.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx

from echo_trt.errors import UserError, shortened, shown
from echo_trt.models.tokenizer import BundleTokenizer
from echo_trt_lab.benchmark.peer import Arrivals, PeerRun, measured

CONNECT_S = 5.0  # seconds to reach a server
SILENCE_S = 600.0  # of a server that computes a prompt; larger: one that hangs is noticed later
PROBE = "A short question."
AGREEMENT = 0.1  # of its rate that a server's own timings may differ from ours; smaller: a busy client is refused
RUNNING = {"include_usage": True, "continuous_usage_stats": True}
#: Tried in this order: ids or text, and options of the stream. vLLM, SGLang, TensorRT-LLM and ours take the first.
FORMS: tuple[tuple[bool, dict[str, bool]], ...] = (
    (True, RUNNING),
    (True, {"include_usage": True}),
    (False, {"include_usage": True}),
)


@dataclass(frozen=True)
class Server:
    """Names a server: ``NAME=URL`` or ``NAME=URL#MODEL``; without a model it is the first that the server lists."""

    name: str
    url: str
    model: str | None

    @classmethod
    def parse(cls, text: str) -> Server:
        name, _, address = text.partition("=")
        url, _, model = address.partition("#")
        if not name or not re.match(r"https?://[^/]", url):
            raise UserError(f"--peers names {shown(text)}; give NAME=URL, as in vllm=http://127.0.0.1:8000.")
        return cls(name, url.rstrip("/").removesuffix("/v1"), model or None)

    def client(self) -> httpx.AsyncClient:
        """Make a client without a bound on connections; the key of $OPENAI_API_KEY goes along, where there is one."""
        key = os.environ.get("OPENAI_API_KEY")
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            # A connection per request: one that is kept may be closed by the server just as the next request is sent.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def find_model(self) -> str:
        """Return the name of the model to ask. Refuses a server that cannot be reached, or has no such model."""
        listed = asyncio.run(self._models())
        if not listed or (self.model and self.model not in listed):
            wanted = f"model {shown(self.model)}" if self.model else "model"
            raise UserError(
                f"peer {self.name}: {self.url} serves no {wanted}; "
                f"write one of {shortened(', '.join(listed)) or 'its models'} behind # in --peers."
            )
        return self.model or listed[0]

    async def _models(self) -> list[str]:
        async with self.client() as client:
            try:
                reply = await client.get("/v1/models")
            except httpx.HTTPError as error:
                raise self.silent(error) from error
        try:
            return [model["id"] for model in reply.raise_for_status().json()["data"]]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            raise UserError(
                f"peer {self.name}: {self.url}/v1/models answers {reply.status_code} ({_message(reply.text)}); name an "
                "OpenAI-compatible server, and set OPENAI_API_KEY if it asks for a key."
            ) from None

    def silent(self, error: httpx.HTTPError) -> UserError:
        reason = str(error) or type(error).__name__
        return UserError(
            f"peer {self.name}: {self.url} does not answer ({shortened(reason)}); start the server, or correct the URL "
            "in --peers."
        )

    def refusal(self, message: str) -> UserError:
        return UserError(
            f"peer {self.name}: {self.url}/v1/completions refuses a request ({_message(message)}); raise its limits, "
            "lower --batch or --max-tokens, or leave the peer out."
        )


class OpenAIPeer:
    """A running server, asked for streams of greedy completions. Its threads, precision and drafts are its own."""

    def __init__(self, server: Server, tokenizer: BundleTokenizer):
        self.name, self._server, self._tokenizer = server.name, server, tokenizer
        self._model = server.find_model()
        self._as_ids, self._options = asyncio.run(self._form())

    def run(self, prompts: list[list[int]], concurrency: int, max_tokens: int) -> PeerRun:
        bodies = [self._body(ids, max_tokens, self._as_ids, self._options) for ids in prompts]
        streams, begin, end = asyncio.run(self._closed_loop(bodies, concurrency))
        streams.sort(key=lambda stream: stream.index)
        arrivals = [s.arrivals(len(prompts[s.index % len(prompts)])) for s in streams]
        self._compare(streams, arrivals)
        first = streams[: len(prompts)]
        run = measured([s.text for s in first], arrivals, concurrency, begin, end)
        reported = [1 / s.rate for s in first if s.rate]
        # A server may send several steps in one event, or a step in two.
        return replace(run, accepted_length=None, reported=reported, cached=sum(s.cached for s in streams))

    def _compare(self, streams: list[_CompletionStream], arrivals: list[Arrivals]) -> None:
        """Refuse a run whose rate is another than by the server's own timings, where it sends some, as llama.cpp's."""
        timed = [(s.rate, a) for s, a in zip(streams, arrivals, strict=True) if s.rate and sum(a.tokens) > 1]
        steps = sum(sum(a.tokens) - 1 for _, a in timed)
        seconds = sum(a.times[-1] - a.times[0] for _, a in timed)
        reported = sum((sum(a.tokens) - 1) / rate for rate, a in timed)
        if abs(seconds - reported) > AGREEMENT * reported:
            raise UserError(
                f"peer {self.name}: a request gets {steps / max(seconds, 1e-9):.1f} tokens/s as they arrive, and "
                f"{steps / reported:.1f} by the server's own timings; end what else runs, or leave the peer out."
            )

    async def _form(self) -> tuple[bool, dict[str, bool]]:
        """Find the form of a request that the server takes, and check that it reads the prompt as we do."""
        ids, refusals = self._tokenizer.encode(PROBE), []
        async with self._server.client() as client:
            for as_ids, options in FORMS:
                try:
                    stream = await self._ask(client, 0, self._body(ids, 4, as_ids, options))
                except UserError as refusal:
                    refusals.append(refusal)
                    continue
                count = stream.usage.get("prompt_tokens")
                if count != len(ids):
                    raise UserError(
                        f"peer {self.name}: {self._server.url} counts {count} tokens in a prompt of {len(ids)}; serve "
                        "the bundle's target with its tokenizer."
                    )
                return as_ids, options
        raise refusals[-1]

    def _body(self, ids: list[int], max_tokens: int, as_ids: bool, options: dict[str, bool]) -> bytes:
        text: dict[str, Any] = {"prompt": self._tokenizer.decode(ids), "add_special_tokens": False}
        body = {"model": self._model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        return json.dumps(body | {"stream_options": options} | ({"prompt": ids} if as_ids else text)).encode()

    async def _closed_loop(self, bodies: list[bytes], concurrency: int) -> tuple[list[_CompletionStream], float, float]:
        """Keep ``concurrency`` streams open until every prompt has an answer; return them, begin and end.

        Streams that are open at the end are read on: a server that does not notice a client's leaving would go on
        computing while the next engine is measured.
        """
        left, streams, begun = set(range(len(bodies))), [], 0
        begin = end = time.perf_counter()

        async def fill_slot(client: httpx.AsyncClient) -> None:
            nonlocal begun, end
            while left:
                index, begun = begun, begun + 1
                streams.append(await self._ask(client, index, bodies[index % len(bodies)]))
                if left:
                    left.discard(index)
                    end = time.perf_counter()

        async with self._server.client() as client:
            await asyncio.gather(*(fill_slot(client) for _ in range(concurrency)))
        return streams, begin, end

    async def _ask(self, client: httpx.AsyncClient, index: int, body: bytes) -> _CompletionStream:
        """Stream one completion. Its events are read later: nothing else is to take time beside the server."""
        lines: list[tuple[float, str]] = []
        sent = time.perf_counter()
        try:
            async with client.stream("POST", "/v1/completions", content=body) as reply:
                if reply.status_code != 200:
                    raise self._server.refusal((await reply.aread()).decode(errors="replace"))
                async for line in reply.aiter_lines():
                    if line:
                        lines.append((time.perf_counter(), line))
        except httpx.HTTPError as error:
            raise self._server.silent(error) from error
        try:
            return _CompletionStream.read(index, sent, lines)
        except ValueError as error:
            raise self._server.refusal(str(error)) from None


@dataclass(frozen=True)
class _CompletionStream:
    """One completion.

    pieces  time of an event, its text, and the answer's tokens so far, None where the server does not tell
    rate    tokens per second without the first token, by the server's own timings; None where it sends none
    """

    index: int
    sent: float
    pieces: list[tuple[float, str, int | None]]
    usage: dict[str, Any]
    rate: float | None = None

    @classmethod
    def read(cls, index: int, sent: float, lines: list[tuple[float, str]]) -> _CompletionStream:
        """Read the events of a stream. Raises ValueError where they hold an error, or no answer."""
        pieces, usage, timings = [], {}, {}
        for when, line in lines:
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise ValueError(json.dumps(event["error"]))
            usage, timings = event.get("usage") or usage, event.get("timings") or timings
            for choice in event.get("choices") or []:
                running = (event.get("usage") or {}).get("completion_tokens")
                pieces.append((when, choice.get("text") or "", running))
        if not pieces or not usage.get("completion_tokens"):
            raise ValueError("a stream ended without tokens, or without their number in its usage")
        return cls(index, sent, pieces, usage, timings.get("predicted_per_second"))

    @property
    def text(self) -> str:
        return "".join(text for _, text, _ in self.pieces)

    @property
    def cached(self) -> int:
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def arrivals(self, prompt: int) -> Arrivals:
        """Return the arrivals of tokens. Those between two counts of the server are spread by characters.

        vLLM counts in every event, others in the last one alone, which has text or not.
        """
        arrivals, counted, since = Arrivals(prompt, self.sent), 0, []
        for when, text, running in self.pieces:
            since.append((when, len(text)))
            if running is not None:
                _spread(arrivals, since, running - counted)
                counted, since = running, []
        left = self.usage["completion_tokens"] - counted
        _spread(arrivals, since or [(self.pieces[-1][0], 0)], left)
        return arrivals


def _spread(arrivals: Arrivals, pieces: list[tuple[float, int]], tokens: int) -> None:
    """Add ``tokens`` at the times of ``pieces`` by their characters; where they have none, at the last."""
    characters = sum(length for _, length in pieces)
    for when, length in pieces if characters else [(pieces[-1][0], 1)]:
        if (share := tokens * length / max(characters, 1)) > 0:
            arrivals.add(when, share)


def _message(body: str) -> str:
    """Return the sentence of an error's body, in the forms of OpenAI, vLLM and FastAPI."""
    try:
        reported = json.loads(body)
    except ValueError:
        reported = body
    for key in ("error", "message", "detail"):
        reported = reported.get(key, reported) if isinstance(reported, dict) else reported
    return shortened(" ".join(str(reported).split()).rstrip(".").replace(". ", ", "))
