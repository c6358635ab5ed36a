"""Questions to an engine from asyncio, over its host's socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from itertools import count
from pathlib import Path
from typing import Any

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.process import wire
from echo_trt.engine.request import FIRST, Event
from echo_trt.files.log import REQUEST_ID

WAIT_S = 10.0  # seconds that a probe, or a question which no iteration answers, may take; larger: a hang shows later
SCRAPE_S = 1.0  # seconds that metrics may take
PROBE = SamplingParams(max_tokens=1, ignore_eos=True)
FRESH_S = 2.0  # seconds for which text proves the engine alive; larger: fewer probes of a busy engine
#: What has come for open questions, by their numbers; None: the engine has left.
Answers = dict[int, "asyncio.Queue[wire.FromEngine | None]"]
AWAY = wire.Failure(kind="away", message="the engine is away.")


class EngineError(Exception):
    """A request that the engine refused or lost, and why."""

    def __init__(self, failure: wire.Failure = AWAY):
        super().__init__(failure.message)
        self.failure = failure


class Client:
    """An engine at the socket ``path``, which need not be there yet. Used within one event loop."""

    def __init__(self, path: Path):
        self._path, self._ids = path, count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting, self._probing = asyncio.Lock(), asyncio.Lock()
        self._unanswered: Answers = {}  # of the connection
        self._info: wire.ModelInfo | None = None  # of the engine that is connected
        self._last_piece = float("-inf")

    async def close(self) -> None:
        """Close the connection; open questions end with an EngineError."""
        if self._reading:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading
        if self._writer:
            self._writer.close()

    async def model_info(self) -> wire.ModelInfo:
        """Return what the engine says of its model. Raises EngineError."""
        if self._info is None:
            answer = await self._single(wire.Describe())
            assert isinstance(answer, wire.ModelInfo)
            self._info = answer
        return self._info

    async def metrics(self) -> str | None:
        """Return the engine's metrics in Prometheus' text format; None where they do not come in time."""
        try:
            answer = await self._single(wire.Scrape(), SCRAPE_S)
        except EngineError:
            return None
        return answer.text if isinstance(answer, wire.MetricsText) else None

    async def snapshots(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield snapshots; the engine makes none once this is closed. Raises EngineError."""
        async with aclosing(self._ask(wire.WatchSnapshots())) as answers:
            async for answer in answers:
                assert isinstance(answer, wire.Snapshot)
                yield answer.content

    async def submit(self, question: wire.Submit) -> AsyncGenerator[Event]:
        """Yield events as they come. Close it early and the engine drops the request. Raises EngineError."""
        question.request_id = REQUEST_ID.get()
        async with aclosing(self._ask(question)) as answers:
            async for event in answers:
                assert isinstance(event, Event)
                self._last_piece = time.monotonic()
                yield event

    def stop(self, question: wire.Submit, tokens: int) -> None:
        """End a request, whose first ``tokens`` have completed a stop string; its last message comes still."""
        if self._writer:
            self._writer.write(wire.framed(wire.Stop(question.id, tokens=tokens)))

    async def check(self, seconds: float | None = None) -> None:
        """Return where the engine works: text has just come, or it does so in ``seconds`` (WAIT_S). Raises EngineError.

        No queue is too full for a probe, and none has to wait for a slot (``engine.service.service``).
        """
        async with self._probing:  # concurrent checks share one probe
            if time.monotonic() - self._last_piece < FRESH_S:
                return
            try:
                async with asyncio.timeout(seconds or WAIT_S):
                    async for _ in self.submit(wire.Submit(prompt=[0], params=PROBE, priority=FIRST)):
                        pass
            except TimeoutError:
                if time.monotonic() - self._last_piece > FRESH_S:
                    raise EngineError from None

    async def _single(self, question: wire.ToEngine, seconds: float = WAIT_S) -> wire.FromEngine:
        """Return the one answer to a question. Raises EngineError."""
        try:
            async with asyncio.timeout(seconds), aclosing(self._ask(question)) as answers:
                return await anext(answers)
        except TimeoutError:
            raise EngineError from None

    async def _ask(self, question: wire.ToEngine) -> AsyncGenerator[wire.FromEngine]:
        """Yield the answer to a question, numbered here; closing the generator early cancels it. Raises EngineError."""
        question.id = next(self._ids)
        writer, done = await self._connected(), False
        frame = wire.framed(question)  # may fail: before the question is noted as open
        unanswered, answers = self._unanswered, asyncio.Queue[wire.FromEngine | None]()
        unanswered[question.id] = answers
        writer.write(frame)
        try:
            while not done:
                message = await answers.get()
                done = not isinstance(message, Event) or bool(message.reason)
                if message is None:
                    raise EngineError
                if isinstance(message, wire.Failure):
                    raise EngineError(message)
                done = done and not isinstance(question, wire.WatchSnapshots)
                yield message
        finally:
            del unanswered[question.id]
            if not done:
                writer.write(wire.framed(wire.Cancel(question.id)))

    async def _connected(self) -> asyncio.StreamWriter:
        """Return the connection, made now where there is none. Raises EngineError."""
        async with self._connecting:
            if self._writer is None or self._writer.is_closing():
                try:
                    reader, self._writer = await asyncio.open_unix_connection(self._path)
                except OSError:
                    raise EngineError from None
                self._unanswered = {}
                self._reading = asyncio.create_task(self._read(reader, self._writer, self._unanswered))
            return self._writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unanswered: Answers) -> None:
        try:
            while (message := await wire.read_answer(reader)) is not None:
                if answers := unanswered.get(message.id):
                    answers.put_nowait(message)
        finally:
            writer.close()
            self._info, self._last_piece = None, float("-inf")  # another engine may come
            for answers in unanswered.values():
                answers.put_nowait(None)
