"""An engine process on a local socket: all requests on one connection, which is made again where it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from echo_trt.gateway.errors import unavailable
from echo_trt.gateway.metrics import Metrics
from echo_trt.gateway.names import Names
from echo_trt.gateway.upstream import Upstream
from echo_trt.serving import wire

SCRAPE_S = 1.0  # how long the engine's metrics may take


class EngineUpstream(Upstream):
    """Messages to the engine at the socket ``path``, and its answers by their numbers."""

    def __init__(self, path: Path, metrics: Metrics):
        super().__init__(metrics)
        self._path, self._ids = path, count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._answers: dict[int, asyncio.Queue[wire.FromEngine | None]] = {}  # None: the engine has left

    async def close(self) -> None:
        if self._reading:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading
        if self._writer:
            self._writer.close()

    async def engine_metrics(self) -> bytes | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_S):
                async for message in self._ask(wire.Scrape(next(self._ids))):
                    return message.text.encode() if isinstance(message, wire.Text) else None
        return None

    async def _messages(self, inputs: Mapping[str, Any], names: Names | None) -> AsyncGenerator[wire.FromEngine]:
        given, id = dict(inputs), next(self._ids)
        question: wire.ToEngine
        if given.pop("describe", False):
            question = wire.Describe(id)
        elif given.pop("watch", False):
            question = wire.Watch(id)
        elif given.pop("tokenize", False):
            question = wire.Tokenize(id, given)
        else:
            question = wire.Submit(id, given)
        async for message in self._ask(question):
            yield message

    async def _ask(self, question: wire.ToEngine) -> AsyncGenerator[wire.FromEngine]:
        """Yield the answer to a question; closing the generator early cancels the question. Raises ApiError."""
        answers = self._answers[question.id] = asyncio.Queue()
        done = True  # until the engine has the question
        try:
            writer = await self._connected()
            writer.write(wire.framed(question))
            done = False
            while not done:
                message = await answers.get()
                if message is None:
                    done = True
                    raise unavailable()
                done = not isinstance(message, wire.Piece) or message.finish_reason is not None
                done = done and not isinstance(question, wire.Watch)
                yield message
        finally:
            del self._answers[question.id]
            if not done and self._writer:
                self._writer.write(wire.framed(wire.Cancel(question.id)))

    async def _connected(self) -> asyncio.StreamWriter:
        """Return the connection, made now where there is none. Raises ApiError."""
        async with self._connecting:
            if self._writer is None or self._writer.is_closing():
                try:
                    reader, self._writer = await asyncio.open_unix_connection(self._path)
                except OSError:
                    raise unavailable() from None
                self._reading = asyncio.create_task(self._read(reader, self._writer))
            return self._writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (message := await wire.read_answer(reader)) is not None:
                if answers := self._answers.get(message.id):
                    answers.put_nowait(message)
        finally:
            writer.close()
            for answers in self._answers.values():
                answers.put_nowait(None)
