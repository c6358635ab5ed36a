"""What the engine does, for pages that draw it: one stream of snapshots from the engine, however many look on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from echo_trt import __version__
from echo_trt.gateway.errors import ApiError, unavailable
from echo_trt.gateway.upstream import Upstream
from echo_trt.serving.protocol import SNAPSHOT_FORMAT

MOST_VIEWERS = 256  # at once; larger: more connections that one address may hold
STUCK_S = 20.0  # without taking a snapshot: a viewer that does not read; larger: it is counted among the others longer
VIEW_S = 600.0  # after which a viewer has to come back; larger: one that never leaves is looked after longer
#: Between two attempts to find an engine that is away, or that takes no more onlookers; larger: fewer lines in the log.
AWAY_S, LONGEST_AWAY_S = 1.0, 4.0
SILENT_S = 15.0  # without an event, after which a viewer gets a comment; larger: one that has left is noticed later
LARGEST = 2**17  # characters of a snapshot; one that is larger is left out


@dataclass(eq=False)
class Viewer:
    """Whoever looks on. Only the newest event waits for it: one that reads slowly misses some."""

    waiting: str | None = None
    came: asyncio.Event = field(default_factory=asyncio.Event)
    taken: float = field(default_factory=time.monotonic)  # when it last took an event
    dropped: bool = False

    def put(self, event: str) -> None:
        """Let the viewer have an event next, in the place of an older one."""
        self.waiting = event
        self.came.set()

    async def take(self) -> str:
        """Wait for the next event."""
        self.taken = time.monotonic()
        await self.came.wait()
        self.came.clear()
        event, self.waiting = self.waiting or "", None
        return event

    @property
    def stuck(self) -> bool:
        """Whether it has left an event waiting for too long."""
        return self.waiting is not None and time.monotonic() - self.taken > STUCK_S


class Live:
    """Viewers, and the engine's snapshots while there is one that reads. Used within one event loop."""

    def __init__(self, upstream: Upstream):
        self._upstream = upstream
        self._viewers: set[Viewer] = set()
        self._looking: asyncio.Task[None] | None = None
        self._leaving = False

    async def close(self) -> None:
        """Stop looking."""
        if self._looking:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking

    def leave(self) -> None:
        """Let every viewer's stream end, and take no more: the server stops."""
        self._leaving = True
        for viewer in self._viewers:
            viewer.dropped = True
            viewer.put(_event("away", json.dumps({"message": "The server stops."})))

    async def events(self, hello: str) -> AsyncGenerator[str]:
        """Server-sent events for one viewer; ``hello`` is the first. Raises ApiError where there are too many."""
        viewer, end = self._admitted(), time.monotonic() + VIEW_S
        try:
            yield hello
            while not viewer.dropped and time.monotonic() < end:
                self._look()
                try:
                    async with asyncio.timeout(SILENT_S):
                        event = await viewer.take()
                except TimeoutError:
                    event = ":\n\n"
                yield event
        finally:
            self._viewers.discard(viewer)

    def _admitted(self) -> Viewer:
        if self._leaving:
            raise unavailable()
        if len(self._viewers) >= MOST_VIEWERS:
            stuck = next((each for each in self._viewers if each.stuck), None)
            if stuck is None:
                message = f"{MOST_VIEWERS} viewers look on already; close some, or come back later."
                raise ApiError(503, message, "server_error", retry_after=30)
            stuck.dropped = True
            self._viewers.discard(stuck)
        viewer = Viewer()
        self._viewers.add(viewer)
        return viewer

    def _look(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        """Hand snapshots to the viewers, until none of them reads."""
        pause = AWAY_S
        while self._looked_at:
            begin = time.monotonic()
            try:
                async with aclosing(self._upstream.snapshots()) as snapshots:
                    async for snapshot in snapshots:
                        if len(snapshot) <= LARGEST:
                            self._put(_event("snapshot", snapshot))
                        if not self._looked_at:
                            return
            except ApiError as error:
                self._put(_event("away", json.dumps(error.body["error"])))
            if time.monotonic() - begin > AWAY_S:
                pause = AWAY_S
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_AWAY_S)

    @property
    def _looked_at(self) -> bool:
        return any(not viewer.stuck for viewer in self._viewers)

    def _put(self, event: str) -> None:
        for viewer in self._viewers:
            viewer.put(event)


async def show_live(request: Request) -> Response:
    """GET /live: snapshots as server-sent events."""
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    state = request.app.state
    hello = {"format": SNAPSHOT_FORMAT, "build": state.page_build, "version": __version__}
    events = state.live.events(_event("hello", json.dumps(hello)))
    first = await anext(events)  # a refusal has its status

    async def all_events() -> AsyncGenerator[str]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(all_events(), media_type="text/event-stream", headers=headers)


async def show_about(request: Request) -> Response:
    """GET /live/about: what a page must know of the model and the server. Raises ApiError."""
    state = request.app.state
    facts = await state.upstream.facts()
    about: dict[str, Any] = {
        "format": SNAPSHOT_FORMAT,
        "build": state.page_build,
        "version": __version__,
        "models": list(state.names),
        "context": facts.context,
        "takes_tools": facts.tool_format is not None,
        "thinks": facts.thought is not None,
        "sampling": facts.sampling,
    }
    return JSONResponse(about, headers={"Cache-Control": "no-store"})


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"
