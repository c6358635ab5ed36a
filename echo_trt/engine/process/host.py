"""An engine's host: it answers the messages of ``wire`` on a Unix socket.

The service tells events on the engine's thread. They wake this loop once per iteration; tokens that came meanwhile go
out together. Requests are taken on a thread of their own, so that a large grammar delays nobody's tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from prometheus_client import generate_latest

from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.process import wire
from echo_trt.engine.process.pending import Pending, failure_of, refusal
from echo_trt.engine.request import ERRORS, Event, Request
from echo_trt.engine.service.job import Job, Overloaded
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.engine.service.service import Service
from echo_trt.engine.service.snapshots import SnapshotRecorder
from echo_trt.engine.sources.calls import skeleton

log = logging.getLogger(__name__)
BEAT = 0.05  # seconds between two looks at what has changed; larger: a drained engine ends later
FLUSH = 0.25  # seconds between two updates of metrics
SNAPSHOT, IDLE_SNAPSHOT = 0.2, 1.0  # seconds between two snapshots, and where nothing happens
MAX_VIEWERS = 8  # clients that get snapshots; an API server is one of them, with all its viewers
#: Bytes that wait for a client before pieces wait in their answers and are joined. Larger: more memory per client.
FULL = 2**23
TOGETHER = 64  # tokens that go out at once where the client wants all at the end; larger: it makes longer texts at once


@dataclass(eq=False)
class ClientConnection:
    """A client. ``answers``: its open questions by their numbers. ``held``: latest events of answers that wait."""

    writer: asyncio.StreamWriter
    answers: dict[int, OpenAnswer] = field(default_factory=dict)
    watches: set[int] = field(default_factory=set)
    held: dict[OpenAnswer, Event] = field(default_factory=dict)

    def send(self, message: wire.FromEngine) -> None:
        if not self.writer.is_closing():
            self.writer.write(wire.framed(message))

    @property
    def full(self) -> bool:
        """Whether the client has much to read."""
        return self.writer.transport.get_write_buffer_size() > FULL


@dataclass(eq=False, kw_only=True)
class OpenAnswer(Pending):
    """An open answer to a client on the socket.

    question  the number of the client's question
    gone      whether nobody wants the answer any longer
    unsent    what of it has not been sent
    """

    connection: ClientConnection
    question: int
    gone: bool = False
    unsent: Event = field(default_factory=Event)

    def add(self, event: Event) -> None:
        self.unsent = event.appended_to(self.unsent)

    @property
    def due(self) -> bool:
        """Whether tokens go out before the answer's end: as they come where the client may stop it."""
        return len(self.unsent.token_ids) >= (1 if self.streamed or self.job.request.params.stop else TOGETHER)

    def take(self) -> Event:
        """Return what has not been sent, which is sent then."""
        news, self.unsent = self.unsent, Event()
        news.id = self.question
        return news


class Host:
    """Answers questions about ``service``, whose ``metrics`` it keeps up to date."""

    def __init__(
        self,
        service: Service,
        bundle: Path,
        metrics: EngineMetrics,
        classes: LatencyClasses | None = None,
        special_tokens_in_content: bool = False,
    ):
        """``bundle``: the model's folder. ``classes``: of latency targets. The last: see ``wire.ModelInfo``."""
        self._service, self._classes = service, classes or LatencyClasses()
        self._info = wire.ModelInfo(
            bundle=str(bundle.absolute()),
            context=service.loop.batch.context,
            sampling=service.llm.manifest.sampling.given(),
            special_tokens_in_content=special_tokens_in_content,
        )
        self._metrics, self._recorder = metrics, SnapshotRecorder(service)
        self._connections: set[ClientConnection] = set()
        self._reading = ThreadPoolExecutor(1, "requests")
        self._events: deque[tuple[OpenAnswer, Event]] = deque()
        self._woken = False
        self._text, self._scraped_at = "", float("-inf")  # of a scrape
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, path: Path, stop: asyncio.Event) -> bool:
        """Answer until ``stop`` is set and requests in flight have ended. Returns whether the engine works still."""
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_unix_server(self._connected, path)
        path.chmod(0o600)  # for its user alone
        self._metrics.flush(self._service.statistics())
        flushed = reported = time.monotonic()
        try:
            while self._service.alive and not (stop.is_set() and self._drained()):
                await asyncio.sleep(BEAT)
                now = time.monotonic()
                if now - flushed >= FLUSH:
                    flushed = now
                    self._metrics.flush(self._service.statistics())
                if now - reported >= (SNAPSHOT if self._recorder.seen else IDLE_SNAPSHOT):
                    reported = now
                    self._send_snapshots()
            return self._service.alive
        finally:
            server.close()
            self._reading.shutdown(wait=False, cancel_futures=True)
            for connection in self._connections:
                connection.writer.close()
            while self._connections:
                await asyncio.sleep(0)

    def _drained(self) -> bool:
        """Take nothing new; return whether every answer has been sent."""
        idle = self._service.drain(0) and not self._tasks and not self._events
        return idle and not any(connection.answers for connection in self._connections)

    # -- questions ---------------------------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = ClientConnection(writer)
        self._connections.add(connection)
        writer.transport.set_write_buffer_limits(high=FULL)
        try:
            while (message := await wire.read_request(reader)) is not None:
                self._take(connection, message)
                await writer.drain()  # who reads nothing is asked nothing
        except ConnectionError:
            pass  # it has left
        finally:
            self._connections.discard(connection)
            for answer in list(connection.answers.values()):
                self._cancel(answer)
            writer.close()

    def _take(self, connection: ClientConnection, message: wire.ToEngine | wire.Failure) -> None:
        match message:
            case wire.Submit():
                self._start(self._submit(connection, message))
            case wire.Cancel():
                connection.watches.discard(message.id)
                if answer := connection.answers.get(message.id):
                    self._cancel(answer)
            case wire.Describe():
                connection.send(structs.replace(self._info, id=message.id))
            case wire.Stop():
                if answer := connection.answers.get(message.id):
                    self._service.stop(answer.job, message.tokens)
            case wire.WatchSnapshots():
                if sum(len(each.watches) for each in self._connections) < MAX_VIEWERS:
                    connection.watches.add(message.id)
                else:
                    sentence = f"{MAX_VIEWERS} clients get snapshots; close one."
                    connection.send(wire.Failure(message.id, kind="away", message=sentence))
            case wire.Scrape():
                connection.send(wire.MetricsText(message.id, text=self._scraped()))
            case wire.Failure():
                connection.send(message)

    def _scraped(self) -> str:
        """Return the metrics as text, FLUSH old at most: many scrapes would take the interpreter from the engine."""
        if (now := time.monotonic()) - self._scraped_at > FLUSH:
            self._text, self._scraped_at = generate_latest(self._metrics.registry).decode(), now
        return self._text

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _submit(self, connection: ClientConnection, message: wire.Submit) -> None:
        prompt = np.empty(0, np.int64)  # it is read where a mistake in it is answered
        request = Request(-1, prompt, message.params, priority=message.priority, sender=message.sender)
        job = Job(request, request_id=message.request_id)
        answer = OpenAnswer(job=job, streamed=message.streamed, connection=connection, question=message.id)
        connection.answers[message.id] = answer
        failure = await self._refusal(partial(self._queue, answer, message), message.request_id)
        if failure:
            connection.answers.pop(message.id, None)
            failure.id = message.id
            connection.send(failure)
        elif answer.gone:
            self._cancel(answer)

    async def _refusal(self, work: Callable[[], None], request_id: str = "") -> wire.Failure | None:
        return await self._loop.run_in_executor(self._reading, refusal, self._metrics, work, request_id)

    def _queue(self, answer: OpenAnswer, message: wire.Submit) -> None:
        if answer.gone:
            raise Overloaded("away", "the request was cancelled.")
        job = answer.job
        job.request.prompt, job.request.calls = np.asarray(message.prompt, np.int64), skeleton(message.calls)
        if message.latency_class and (latency := self._classes.read(message.latency_class)):
            job.request.params = replace(message.params, latency=latency)
        job.seconds = message.deadline_ms / 1000 if message.deadline_ms else None

        def tell(event: Event) -> None:
            self._events.append((answer, event))
            if not self._woken:
                self._woken = True
                self._loop.call_soon_threadsafe(self._send_events)

        job.on_event = tell
        self._service.submit(job)

    def _cancel(self, answer: OpenAnswer) -> None:
        answer.gone = True
        self._service.cancel(answer.job)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _send_events(self) -> None:
        """Send what the engine has told since the last call, a piece per answer."""
        self._woken = False
        latest: dict[OpenAnswer, Event] = {}
        while self._events:
            answer, event = self._events.popleft()
            latest[answer] = event
            answer.observe(event, self._metrics)
            self._try(answer, answer.add, event)
        for answer, event in latest.items():
            self._tell(answer, event)

    def _tell(self, answer: OpenAnswer, event: Event) -> None:
        """Send what is due of an answer, or let it wait until its client has read."""
        connection = answer.connection
        if connection.full and not connection.writer.is_closing():
            if not connection.held:
                self._start(self._tell_later(connection))
            connection.held[answer] = event
            return
        self._try(answer, self._send, answer, event)
        if event.reason:
            connection.answers.pop(answer.question, None)

    async def _tell_later(self, connection: ClientConnection) -> None:
        with suppress(ConnectionError):
            await connection.writer.drain()
        held, connection.held = connection.held, {}
        for answer, event in held.items():
            self._tell(answer, event)

    def _try(self, answer: OpenAnswer, work: Any, *inputs: Any) -> None:
        """Do the work; where it fails, its answer alone ends with an error."""
        if answer.broken:
            return
        try:
            work(*inputs)
        except Exception:
            log.exception("an answer could not be sent; its request is cancelled", extra=answer.job.named)
            answer.broken = True
            self._cancel(answer)
            sentence = "the answer could not be sent; the server's log says why."
            answer.connection.send(wire.Failure(answer.question, kind="failed", message=sentence))

    def _send(self, answer: OpenAnswer, event: Event) -> None:
        if event.reason in ERRORS:
            answer.connection.send(failure_of(event, answer.question))
        elif event.reason or answer.due:
            answer.connection.send(answer.take())

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def _send_snapshots(self) -> None:
        watched = [(connection, id) for connection in self._connections for id in connection.watches]
        if self._recorder.on != bool(watched):
            self._recorder.switch(not self._recorder.on)
        if watched:
            snapshot = self._recorder.snapshot()
            for connection, id in watched:
                if not connection.full:
                    connection.send(wire.Snapshot(id, content=snapshot))
