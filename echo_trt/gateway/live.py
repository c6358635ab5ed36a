"""GET /live: the engine's snapshots as server-sent events. All viewers share one stream from the engine."""

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

MOST_VIEWERS = 256  # viewers at once; larger: more open connections
STUCK_S = 20.0  # seconds that an event may wait for a viewer; larger: one that does not read keeps its place longer
VIEW_S = 600.0  # seconds after which a viewer has to ask again; larger: a connection that nobody closes lasts longer
#: Seconds between attempts to reach an engine that is away or takes no more onlookers; larger: fewer lines in the log.
AWAY_S, LONGEST_AWAY_S = 1.0, 4.0
SILENT_S = 15.0  # seconds without an event until a viewer gets a comment; larger: a viewer's end is noticed later
LARGEST = 2**17  # characters of a snapshot that is passed on; larger: more memory for a viewer that reads slowly


@dataclass(eq=False)
class Viewer:
    """A client of GET /live. The newest event alone waits for it, so a viewer that reads slowly misses events.

    waiting  the event that it gets next
    came     set while an event waits
    taken    time.monotonic() at which it last asked for an event
    dropped  whether its stream has to end
    """

    waiting: str | None = None
    came: asyncio.Event = field(default_factory=asyncio.Event)
    taken: float = field(default_factory=time.monotonic)
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
        """Whether an event has waited for it longer than STUCK_S."""
        return self.waiting is not None and time.monotonic() - self.taken > STUCK_S


class Live:
    """Hands the engine's snapshots to viewers, and asks the engine for them while a viewer reads.

    It is used within one event loop.
    """

    def __init__(self, upstream: Upstream):
        self._upstream = upstream
        self._viewers: set[Viewer] = set()
        self._looking: asyncio.Task[None] | None = None
        self._leaving = False

    async def close(self) -> None:
        """Stop asking the engine."""
        if self._looking:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking

    def leave(self) -> None:
        """End the streams of all viewers and refuse new ones, since the server stops."""
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
        """Hand the engine's snapshots to the viewers, until no viewer reads."""
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
    """GET /live/about: the facts of model and server that the page shows or needs. Raises ApiError."""
    state = request.app.state
    facts = await state.upstream.facts()
    about: dict[str, Any] = {
        "format": SNAPSHOT_FORMAT,
        "build": state.page_build,
        "version": __version__,
        "models": list(state.names),
        "context": facts.context,
        "thinks": facts.thought is not None,
        "sampling": facts.sampling,
    }
    return JSONResponse(about, headers={"Cache-Control": "no-store"})


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"
