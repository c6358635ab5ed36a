"""An engine as the gateway asks it, whatever is between them: messages of ``serving.wire``."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from echo_trt.gateway.errors import ApiError, from_grpc, unavailable
from echo_trt.gateway.facts import Facts
from echo_trt.gateway.metrics import Metrics
from echo_trt.gateway.names import Names
from echo_trt.serving import wire
from echo_trt.serving.protocol import FIRST

FACTS_S = 60.0  # how long facts hold: an engine may come back with another bundle while nobody asks
FRESH_S = 2.0  # text that came within this long ago proves the engine alive
SINGLE = frozenset({"describe", "tokenize"})  # inputs of questions that have one response
PROBE_S = 10.0  # how long a probe waits for its token, or for an iteration of the engine's


@dataclass(frozen=True)
class Piece:
    """New text of one choice; the last one has a ``finish_reason`` and ``cached_tokens``."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # up to the end of this piece
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of the tokens of the text
    token_ids: list[int] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)  # who proposed the tokens of the text, where asked for
    in_thought: bool = False  # of the first one: whether the prompt has opened a thought


class Upstream(ABC):
    """One engine. Made and used within one event loop."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._last_piece = float("-inf")
        self._facts: Facts | None = None
        self._asked_for_facts = float("-inf")
        self._probing = asyncio.Lock()

    @abstractmethod
    async def close(self) -> None:
        """Wait for streams that are ending, and close the connection."""

    @abstractmethod
    async def engine_metrics(self) -> bytes | None:
        """The engine's series ``echo_*`` in Prometheus' text format; None where they do not come in time."""

    @abstractmethod
    def _messages(self, inputs: Mapping[str, Any], names: Names | None) -> AsyncGenerator[wire.FromEngine]:
        """Yield the answer to ``inputs`` as it comes; closed early, the engine drops it. Raises ApiError."""

    async def facts(self) -> Facts:
        """What the engine says of its model; asked now and then, and where it has been away. Raises ApiError."""
        facts = self._facts
        if facts is None or time.monotonic() - self._asked_for_facts > FACTS_S:
            self._asked_for_facts = time.monotonic()
            answer = await self._single({"describe": True})
            self._facts = facts = Facts.read(answer.text or "")
        return facts

    async def token_ids(self, inputs: Mapping[str, Any], names: Names) -> list[int]:
        """Of the prompt that ``inputs`` hold. Raises ApiError."""
        answer = await self._single({**inputs, "tokenize": True}, names)
        return answer.token_ids if isinstance(answer, wire.Tokens) else []

    async def text(self, token_ids: list[int], names: Names) -> str:
        """Of tokens. Raises ApiError."""
        return (await self._single({"input_ids": token_ids, "tokenize": True}, names)).text or ""

    async def snapshots(self) -> AsyncGenerator[str]:
        """Yield snapshots for some seconds, as JSON; the engine makes none once this is closed. Raises ApiError."""
        async with aclosing(self._results({"watch": True})) as answers:
            async for answer in answers:
                if isinstance(answer, wire.Text) and answer.text:  # Triton's model ends a watch with an empty one
                    yield answer.text

    async def _single(self, inputs: Mapping[str, Any], names: Names | None = None) -> wire.Text | wire.Tokens:
        """The one response to a question that the engine's loop does not see. Raises ApiError."""
        try:
            async with asyncio.timeout(PROBE_S), aclosing(self._results(inputs, names)) as answers:
                answer = await anext(answers)
                assert isinstance(answer, wire.Text | wire.Tokens)
                return answer
        except TimeoutError:
            raise unavailable() from None

    async def stream(self, inputs: Mapping[str, Any], names: Names | None = None) -> AsyncGenerator[Piece]:
        """Pieces as they come. Close it early and the engine drops the request. Raises ApiError."""
        begin, first, tokens = time.monotonic(), True, 0
        async with aclosing(self._results(inputs, names)) as answers:
            async for answer in answers:
                assert isinstance(answer, wire.Piece)
                piece = _piece(answer, tokens)
                tokens = piece.completion_tokens
                self._last_piece = time.monotonic()
                if first and inputs.get("stream"):
                    self._metrics.first_text.observe(self._last_piece - begin)
                first = False
                yield piece

    async def _results(self, inputs: Mapping[str, Any], names: Names | None = None) -> AsyncGenerator[wire.FromEngine]:
        """``_messages``; what is known of the engine is forgotten where they fail, since another engine may come."""
        try:
            async with aclosing(self._messages(inputs, names)) as messages:
                async for message in messages:
                    if isinstance(message, wire.Failure):
                        raise from_grpc(message.code, message.message, names)
                    yield message
        except ApiError:
            self._facts = None
            raise

    async def check(self) -> None:
        """Return where the engine works: text has just come, or it does so now. Raises ApiError where it does not.

        No queue is too full for a probe, and none has to wait for a place (``serving.service``).
        """
        async with self._probing:  # many who ask are one probe
            if self._silent_for() < FRESH_S:
                return
            probe = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}
            try:
                async with asyncio.timeout(PROBE_S):
                    async for _ in self.stream(probe):
                        pass
            except TimeoutError:
                if self._silent_for() > FRESH_S:
                    raise unavailable() from None

    def _silent_for(self) -> float:
        return time.monotonic() - self._last_piece


def _piece(answer: wire.Piece, before: int) -> Piece:
    """``before``: completion tokens of the pieces before this one. Raises ApiError."""
    reason, tokens = answer.finish_reason, before + len(answer.token_ids)
    if reason:
        tokens = answer.completion_tokens
    if reason == "deadline":
        if not tokens:
            raise from_grpc("DEADLINE_EXCEEDED", "")
        reason = "length"  # OpenAI's word for a text that was cut short
    return Piece(
        answer.text,
        reason,
        answer.prompt_tokens,
        answer.cached_tokens,
        tokens,
        json.loads(answer.logprobs or "[]"),
        answer.token_ids,
        json.loads(answer.sources or "[]"),
        answer.in_thought,
    )
