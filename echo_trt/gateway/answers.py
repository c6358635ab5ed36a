"""Pieces of text in the shape of OpenAI's answers, whole and as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from echo_trt.gateway.choices import ClientGone, Pieces
from echo_trt.gateway.errors import ApiError
from echo_trt.gateway.logprobs import Entry, for_chat, for_completion
from echo_trt.gateway.metrics import Metrics
from echo_trt.gateway.turns import Delta, Message, Turn
from echo_trt.serving.wire import Piece


@dataclass
class Usage:
    """Tokens of an answer: every prompt counts once however many choices it has, every choice counts."""

    n: int
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int | None = None  # None for a model that does not think

    def add(self, choice: int, last: Piece, turn: Turn | None) -> None:
        self.completion += last.completion_tokens
        if turn and turn.thinks:
            self.reasoning = (self.reasoning or 0) + turn.reasoning_tokens
        if choice % self.n == 0:
            self.prompt += last.prompt_tokens
            self.cached += last.cached_tokens

    def body(self) -> dict[str, Any]:
        body = _counts(self.prompt, self.completion) | {"prompt_tokens_details": {"cached_tokens": self.cached}}
        if self.reasoning is not None:
            body["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return body


@dataclass
class Details:
    """Details of tokens that an answer brings: log-probabilities, and sources. False where there are none."""

    logprobs: list[Entry] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.logprobs or self.sources)

    def add(self, piece: Piece) -> None:
        """Append the details of a piece."""
        self.logprobs += entries(piece.logprobs)
        self.sources += entries(piece.sources)


@dataclass
class Answer:
    """One HTTP request's answer, of ``choices`` texts, n of them a prompt.

    turns  readers of a chat's texts, one a choice; empty for a completion
    """

    turns: list[Turn]
    model: str
    choices: int
    n: int
    metrics: Metrics
    wants_usage: bool = False
    wants_running_usage: bool = False  # in every chunk, of its choice so far
    wants_logprobs: bool = False
    wants_sources: bool = False  # who proposed the tokens
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.chat = bool(self.turns)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(16)

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        """The body of an answer that is not streamed, once all choices have ended."""
        messages = [Message() for _ in range(self.choices)]
        reasons, usage = [""] * self.choices, Usage(self.n)
        details = [Details() for _ in range(self.choices)]
        async for choice, piece in pieces:
            for delta in self._deltas(choice, piece):
                messages[choice].add(delta)
            details[choice].add(piece)
            if piece.finish_reason:
                reasons[choice] = self._end(choice, piece, usage)
        self._count(usage)
        kind = "chat.completion" if self.chat else "text_completion"
        said = zip(messages, reasons, details, strict=True)
        choices = [self._choice(index, *each) for index, each in enumerate(said)]
        return self._head(kind) | {"choices": choices, "usage": usage.body()}

    async def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[str]:
        """Server-sent events. A failure on the way is an event too, for the status has long been sent."""
        usage = Usage(self.n)
        waiting = [Details() for _ in range(self.choices)]  # of tokens whose text is not certain yet
        try:
            if self.chat:
                prompt = first[1].prompt_tokens  # all choices of a chat have one prompt
                for index in range(self.choices):
                    yield self._chunk([_delta(index, {"role": "assistant", "content": ""})], prompt, 0)
            async for choice, piece in chained(first, pieces):
                counts = piece.prompt_tokens, piece.completion_tokens
                deltas = self._deltas(choice, piece)
                waiting[choice].add(piece)
                reason = self._end(choice, piece, usage) if piece.finish_reason else None
                if not self.chat:
                    yield self._chunk([self._new_text(choice, piece)], *counts)
                    continue
                for delta in deltas:
                    told, waiting[choice] = self._detailed(waiting[choice]), Details()
                    yield self._chunk([_delta(choice, delta) | told], *counts)
                if reason:
                    told = self._detailed(waiting[choice]) if waiting[choice] else {}
                    yield self._chunk([_delta(choice, {}, reason) | told], *counts)
            if self.wants_usage:
                yield _event(self._head(self._chunk_kind) | {"choices": [], "usage": usage.body()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        except ClientGone:
            self.metrics.disconnects.inc()
        finally:
            self._count(usage)

    def _deltas(self, choice: int, piece: Piece) -> list[Delta]:
        return self.turns[choice].take(piece) if self.chat else [{"content": piece.text}]

    def _end(self, choice: int, last: Piece, usage: Usage) -> str:
        """Count a choice that has ended; returns the reason, as OpenAI has it."""
        turn, reason = self.turns[choice] if self.chat else None, last.finish_reason or ""
        usage.add(choice, last, turn)
        return turn.reason(reason) if turn else reason

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]], prompt_tokens: int, completion_tokens: int) -> str:
        chunk = self._head(self._chunk_kind) | {"choices": choices}
        if self.wants_running_usage:
            chunk["usage"] = _counts(prompt_tokens, completion_tokens)
        elif self.wants_usage:
            chunk["usage"] = None
        return _event(chunk)

    def _new_text(self, index: int, piece: Piece) -> dict[str, Any]:
        told = self._detailed(Details(entries(piece.logprobs), entries(piece.sources)))
        return {"index": index, "text": piece.text, **told, "finish_reason": piece.finish_reason}

    def _choice(self, index: int, message: Message, reason: str, details: Details) -> dict[str, Any]:
        said = {"message": message.body()} if self.chat else {"text": message.content}
        return {"index": index, **said, **self._detailed(details), "finish_reason": reason}

    def _detailed(self, details: Details) -> dict[str, Any]:
        """Return a choice's fields of details: ``logprobs``, and ``token_sources`` where the request asks for them."""
        logprobs: dict[str, Any] | None = None
        if self.wants_logprobs:
            logprobs = for_chat(details.logprobs) if self.chat else for_completion(details.logprobs)
        sources = {"token_sources": details.sources} if self.wants_sources else {}
        return {"logprobs": logprobs, **sources}

    def _count(self, usage: Usage) -> None:
        self.metrics.prompt_tokens.inc(usage.prompt)
        self.metrics.completion_tokens.inc(usage.completion)


class EventStream(StreamingResponse):
    """Sends events; however that ends, the engine's streams are closed. ``pieces`` themselves notice a hang-up."""

    def __init__(self, events: AsyncIterator[str], pieces: Pieces):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            await self._pieces.aclose()


async def chained(first: tuple[int, Piece], rest: Pieces) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for item in rest:
        yield item


def entries(details: str) -> list[dict[str, Any]]:
    """Read a piece's log-probabilities or sources."""
    return json.loads(details) if details else []


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _delta(index: int, delta: Delta, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
