"""Pieces of text as answers, whole and as events: what all APIs share, and the shape of OpenAI's chats."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from echo_trt.server import answer_types as api
from echo_trt.server.choices import ClientGone, PieceStream
from echo_trt.server.errors import ApiError, stopped
from echo_trt.server.fields import RequestBody
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.schemas import ChatRequest, CompletionRequest, Params
from echo_trt.server.text_client import TextPiece
from echo_trt.server.turns import OutputParser

Item = TypeVar("Item")
Requested = TypeVar("Requested", bound=RequestBody)
OpenAIRequest = TypeVar("OpenAIRequest", bound=Params)
AnswerEvent = Mapping[str, Any]
TokenLogprob = dict[str, Any]  # of a token: token, logprob, bytes, top_logprobs (a list of such), text_offset


class Answer(ABC, Generic[Requested]):
    """One HTTP request's answer: a text for each of ``turns``; ``_turn`` is the first turn."""

    media_type = "text/event-stream"
    last = ""  # what is sent behind all events

    def __init__(self, requested: Requested, turns: list[OutputParser], metrics: ServerMetrics):
        self._requested, self._turns, self._turn, self._metrics = requested, turns, turns[0], metrics
        self._prompts = turns  # one of each prompt's
        self._id, self._created = secrets.token_hex(16), int(time.time())
        self.error: dict[str, Any] = {}  # that ended it, as ``ApiError.logged``

    async def whole(self, pieces: PieceStream) -> AnswerEvent:
        """Return the body of an answer that is not streamed, once all texts have ended."""
        async for choice, piece in pieces:
            for _event in self.take(choice, piece):
                pass
        self._count()
        return self.complete()

    async def events(self, first: tuple[int, TextPiece], pieces: PieceStream) -> AsyncIterator[str]:
        """Yield what is sent. A failure on the way is an event too, for the status has long been sent."""
        try:
            for event in self.begin(first[1]):
                yield self.written(event)
            async for choice, piece in chained(first, pieces):
                for event in self.take(choice, piece):
                    yield self.written(event)
            for event in self.end():
                yield self.written(event)
            if self.last:
                yield self.last
        except (ApiError, asyncio.CancelledError) as ended:  # cancelled: by the server's end
            error = ended if isinstance(ended, ApiError) else stopped()
            self.error = error.logged()
            for event in self.failed(self._requested.in_client_fields(error)):
                yield self.written(event)
        except ClientGone:
            self._metrics.disconnects.inc()
        finally:
            self._count()

    def _count(self) -> None:
        prompts = sum(turn.newest.prompt_tokens for turn in self._prompts if turn.finish_reason)
        self._metrics.prompt_tokens.inc(prompts)
        tokens = sum(turn.newest.completion_tokens for turn in self._turns if turn.finish_reason)
        self._metrics.completion_tokens.inc(tokens)

    def summary(self) -> dict[str, Any]:
        """Return what the log says of it, whose choices are one answer; tokens as far as they are known."""
        turns, prompts = [turn.newest for turn in self._turns], [turn.newest for turn in self._prompts]
        reasons = dict.fromkeys(turn.finish_reason or "cancelled" for turn in self._turns)
        tokens = {
            "prompt_tokens": sum(each.prompt_tokens for each in prompts),
            "cached_tokens": sum(each.cached_tokens for each in prompts),
            "completion_tokens": sum(each.completion_tokens for each in turns),
            "queue_ms": max((each.queue_ms for each in turns if each.queue_ms is not None), default=None),
            "first_token_ms": min((t.first_token_ms for t in turns if t.first_token_ms is not None), default=None),
        }
        known = tokens if tokens["prompt_tokens"] else {}
        return {"model": getattr(self._requested, "model", None), "finish_reason": ",".join(reasons), **known}

    def begin(self, first: TextPiece) -> Iterator[AnswerEvent]:
        """Yield events before the first text."""
        return iter(())

    @abstractmethod
    def take(self, choice: int, piece: TextPiece) -> Iterator[AnswerEvent]:
        """Yield events of the text that became certain."""

    @abstractmethod
    def end(self) -> Iterator[AnswerEvent]: ...

    @abstractmethod
    def failed(self, error: ApiError) -> Iterator[AnswerEvent]: ...

    @abstractmethod
    def complete(self) -> AnswerEvent:
        """Return the answer, once its texts have ended."""

    def written(self, event: AnswerEvent) -> str:
        """Return an event as it is sent."""
        kind = f"event: {event['type']}\n" if "type" in event else ""
        return f"{kind}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


class ApiAnswer(Answer[OpenAIRequest]):
    """The answer to a chat or completions; ``requested.n`` turns are of one prompt."""

    last = "data: [DONE]\n\n"
    prefix = ""  # of its id

    def __init__(self, requested: OpenAIRequest, turns: list[OutputParser], metrics: ServerMetrics):
        super().__init__(requested, turns, metrics)
        self._prompts = turns[:: requested.n]
        self._id = self.prefix + self._id

    def failed(self, error: ApiError) -> Iterator[AnswerEvent]:
        yield error.body

    def _head(self) -> api.AnswerHead:
        return {"id": self._id, "created": self._created, "model": self._requested.model}

    def _running(self, piece: TextPiece) -> api.RunningUsage:
        """Return a chunk's field of usage, where it has one."""
        if self._requested.wants_running_usage:
            return {"usage": _counts(piece.prompt_tokens, piece.completion_tokens)}
        return {"usage": None} if self._requested.wants_usage else {}

    def _taken(self, turn: OutputParser) -> tuple[list[TokenLogprob] | None, api.SourcedChoice]:
        """Take a choice's log-probabilities, None where none are asked for, and its field ``token_sources``."""
        entries, sources = turn.take_details()
        sourced: api.SourcedChoice = {"token_sources": sources} if self._requested.token_sources else {}
        return (None if self._requested.alternatives is None else entries), sourced

    def _usage(self) -> api.Usage:
        """Count tokens: every prompt once however many choices it has, and every choice."""
        prompt = sum(turn.newest.prompt_tokens for turn in self._prompts)
        body = _counts(prompt, sum(turn.newest.completion_tokens for turn in self._turns))
        body["prompt_tokens_details"] = {"cached_tokens": sum(turn.newest.cached_tokens for turn in self._prompts)}
        if details := completion_details(self._turns):
            body["completion_tokens_details"] = details
        return body

    def _ended(self) -> api.AnswerHead:
        """Return the head, and vLLM's field of draft acceptance where one choice was asked for and drafts verified."""
        head, last = self._head(), self._turn.newest
        drafted, accepted = last.drafted, last.accepted
        if len(self._turns) > 1 or not drafted:
            return head
        reported: api.DraftAcceptance = {
            "mean_acceptance_length": 1 + sum(accepted) / len(accepted),
            "draft_acceptance_rate": sum(accepted) / sum(drafted),
            "acceptance_histogram": [accepted.count(length) for length in range(max(accepted) + 1)],
            "num_spec_steps": len(accepted),
            "num_accepted_draft_tokens": sum(accepted),
            "num_draft_tokens": sum(drafted),
            "per_step_accepted": accepted,
            "per_step_drafted": drafted,
        }
        if last.saved_ms is not None and last.saved_error_ms is not None:
            reported |= {"saved_ms": last.saved_ms, "saved_error_ms": last.saved_error_ms}
        return {**head, "metrics": {"speculative_decoding": reported}}


class ChatAnswer(ApiAnswer[ChatRequest]):
    """The answer to a chat."""

    prefix = "chatcmpl-"

    def complete(self) -> api.ChatCompletion:
        choices: list[api.ChatChoice] = []
        for index, turn in enumerate(self._turns):
            message, details = turn.message(), self._details(turn)
            choices.append({"index": index, "message": message, **details, "finish_reason": turn.finish_reason})
        return {**self._ended(), "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def begin(self, first: TextPiece) -> Iterator[api.ChatCompletionChunk]:
        begin = TextPiece(prompt_tokens=first.prompt_tokens)  # all choices of a chat have one prompt
        for index in range(len(self._turns)):
            yield self._chunk(_delta(index, {"role": "assistant", "content": ""}), begin)

    def take(self, choice: int, piece: TextPiece) -> Iterator[api.ChatCompletionChunk]:
        turn = self._turns[choice]
        deltas = turn.take(piece)
        if not self._requested.stream:
            return
        for delta in deltas:
            yield self._chunk({**_delta(choice, delta), **self._details(turn)}, piece)
        if turn.finish_reason:
            last = _delta(choice, {}, turn.finish_reason)
            yield self._chunk({**last, **self._details(turn)} if turn.logprobs or turn.sources else last, piece)

    def end(self) -> Iterator[api.ChatCompletionChunk]:
        if self._requested.wants_usage:
            yield {**self._ended(), "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _details(self, turn: OutputParser) -> api.ChatDetails:
        entries, sourced = self._taken(turn)
        return {"logprobs": None if entries is None else chat_logprobs(entries), **sourced}

    def _chunk(self, choice: api.ChunkChoice, piece: TextPiece) -> api.ChatCompletionChunk:
        return {**self._head(), "object": "chat.completion.chunk", "choices": [choice], **self._running(piece)}


class TextAnswer(ApiAnswer[CompletionRequest]):
    """The answer to completions."""

    prefix = "cmpl-"

    def complete(self) -> api.TextCompletion:
        turns = enumerate(self._turns)
        choices = [self._choice(index, turn, turn.content, turn.finish_reason) for index, turn in turns]
        return {**self._ended(), "object": "text_completion", "choices": choices, "usage": self._usage()}

    def take(self, choice: int, piece: TextPiece) -> Iterator[api.TextCompletion]:
        turn = self._turns[choice]
        turn.take(piece)
        if self._requested.stream:
            choices = [self._choice(choice, turn, piece.text, turn.finish_reason or None)]
            yield {**self._head(), "object": "text_completion", "choices": choices, **self._running(piece)}

    def end(self) -> Iterator[api.TextCompletion]:
        if self._requested.wants_usage:
            yield {**self._ended(), "object": "text_completion", "choices": [], "usage": self._usage()}

    def _choice(self, index: int, turn: OutputParser, text: str, reason: api.FinishReason | None) -> api.TextChoice:
        entries, sourced = self._taken(turn)
        logprobs = None if entries is None else _completion_logprobs(entries)
        return {"index": index, "text": text, "logprobs": logprobs, **sourced, "finish_reason": reason}


class EventStream(StreamingResponse):
    """Sends events; however that ends, the engine's streams are closed. ``pieces`` themselves notice a hang-up.

    A failure behind the headers is the scope's "failed", by which the answer is counted (``edge``).
    """

    def __init__(self, answer: Answer[Any], first: tuple[int, TextPiece], pieces: PieceStream):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(first, pieces), media_type=answer.media_type, headers=headers)
        self._answer, self._pieces = answer, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            if self._answer.error:
                scope["failed"] = self._answer.error["status"]
            await self._pieces.aclose()


async def chained(first: Item, rest: AsyncGenerator[Item]) -> AsyncIterator[Item]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


def chat_logprobs(entries: Sequence[TokenLogprob]) -> api.ChatLogprobs:
    content: list[api.ChatToken] = [
        {"token": e["token"], "logprob": e["logprob"], "bytes": e["bytes"], "top_logprobs": e["top_logprobs"]}
        for e in entries
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(entries: Sequence[TokenLogprob]) -> api.TextLogprobs:
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [_by_token(entry) for entry in entries],
        "text_offset": [entry["text_offset"] for entry in entries],
    }


def _by_token(entry: TokenLogprob) -> dict[str, float] | None:
    """Return the best tokens' log-probabilities and the token's own, so there may be one more than asked for."""
    if entry["logprob"] is None:  # a prompt's first token
        return None
    return {each["token"]: each["logprob"] for each in (*entry["top_logprobs"], entry)}


def completion_details(turns: Sequence[OutputParser]) -> api.CompletionDetails:
    """Count tokens of thoughts, where the model thinks, and of predictions, where there are any."""
    details: api.CompletionDetails = {}
    if turns[0].thinks:
        details["reasoning_tokens"] = sum(turn.reasoning_tokens for turn in turns)
    if predicted := sum(turn.newest.prediction for turn in turns):
        details["accepted_prediction_tokens"] = sum(turn.newest.predicted for turn in turns)
        details["rejected_prediction_tokens"] = predicted - details["accepted_prediction_tokens"]
    return details


def _counts(prompt: int, completion: int) -> api.Usage:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _delta(index: int, delta: api.MessageDelta, reason: api.FinishReason | None = None) -> api.ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
