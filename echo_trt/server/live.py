"""GET /live: the engine's snapshots as server-sent events. All viewers share one stream from the engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from echo_trt import __version__
from echo_trt.engine.process.client import Client, EngineError
from echo_trt.engine.service import SNAPSHOT_FORMAT
from echo_trt.server.answer_types import About
from echo_trt.server.answers import chained
from echo_trt.server.errors import ApiError, from_engine, unavailable

MAX_VIEWERS = 256  # viewers at once; larger: more open connections
# Seconds that an event may wait for a viewer; larger: a viewer that does not read stays connected longer
STUCK_S = 20.0
VIEW_S = 600.0  # seconds after which a viewer has to ask again; larger: forgotten connections last longer
AWAY_S = 1.0  # seconds between attempts to reach an engine that is away; larger: one that is back is seen later
SILENT_S = 15.0  # seconds without an event until a viewer gets a comment; larger: a viewer's end is noticed later
LARGEST = 2**17  # characters of a snapshot that is passed on; larger: more memory for a viewer that reads slowly


class Live:
    """Hands the engine's snapshots to viewers, and asks the engine for them while a viewer reads.

    A viewer that reads slowly misses events. Used within one event loop.
    """

    def __init__(self, client: Client):
        self._client = client
        self._viewers: dict[object, float] = {}  # viewer -> time.monotonic() at which it took an event
        self._next: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reported = 0.0  # time.monotonic() of the latest event
        self._looking: asyncio.Task[None] | None = None
        self._leaving = False

    async def close(self) -> None:
        if self._looking:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking

    def leave(self) -> None:
        """End the streams of all viewers and refuse new ones, since the server stops."""
        self._leaving = True
        self._report("away", json.dumps({"message": "The server stops."}))
        self._viewers.clear()

    async def events(self, hello: str) -> AsyncGenerator[str]:
        """Yield one viewer's events, of which ``hello`` is the first. Raises ApiError where there are too many."""
        viewer, end = object(), time.monotonic() + VIEW_S
        self._admit(viewer)
        try:
            yield hello
            while viewer in self._viewers and time.monotonic() < end:
                if self._looking is None or self._looking.done():
                    self._looking = asyncio.create_task(self._look())
                try:
                    async with asyncio.timeout(SILENT_S):
                        event = await asyncio.shield(self._next)
                except TimeoutError:
                    event = ":\n\n"
                if viewer in self._viewers:
                    self._viewers[viewer] = time.monotonic()
                yield event
        finally:
            self._viewers.pop(viewer, None)

    def _admit(self, viewer: object) -> None:
        if self._leaving:
            raise unavailable()
        if len(self._viewers) >= MAX_VIEWERS:
            stuck = next(filter(self._is_stuck, self._viewers), None)
            if stuck is None:
                message = f"{MAX_VIEWERS} viewers look on already; close some, or come back later."
                raise ApiError(503, message, "server_error", retry_after=30)
            del self._viewers[stuck]
        self._viewers[viewer] = time.monotonic()

    async def _look(self) -> None:
        """Hand the engine's snapshots to the viewers, until no viewer reads."""
        while self._looked_at:
            try:
                async with aclosing(self._client.snapshots()) as snapshots:
                    async for snapshot in snapshots:
                        text = json.dumps(snapshot, separators=(",", ":"))
                        if len(text) <= LARGEST:
                            self._report("snapshot", text)
                        if not self._looked_at:
                            return
            except EngineError as error:
                self._report("away", json.dumps(from_engine(error.failure).body["error"]))
            await asyncio.sleep(AWAY_S)

    @property
    def _looked_at(self) -> bool:
        return not all(map(self._is_stuck, self._viewers))

    def _is_stuck(self, viewer: object) -> bool:
        """Return whether a viewer has not taken the latest event, for longer than STUCK_S."""
        taken = self._viewers[viewer]
        return taken < self._reported and time.monotonic() - taken > STUCK_S

    def _report(self, kind: str, data: str) -> None:
        reported, self._next = self._next, asyncio.get_running_loop().create_future()
        self._reported = time.monotonic()
        reported.set_result(_event(kind, data))


async def show_live(request: Request) -> Response:
    """GET /live: snapshots as server-sent events."""
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    state = request.app.state
    hello = {"format": SNAPSHOT_FORMAT, "build": state.page_build, "version": __version__}
    events = state.live.events(_event("hello", json.dumps(hello)))
    first = await anext(events)  # a refusal has its status
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(chained(first, events), media_type="text/event-stream", headers=headers)


async def show_about(request: Request) -> Response:
    """GET /live/about: the facts of model and server that the page shows or needs. Raises EngineError."""
    state = request.app.state
    info = await state.client.model()
    about: About = {
        "format": SNAPSHOT_FORMAT,
        "build": state.page_build,
        "version": __version__,
        "models": list(state.names),
        "context": info.context,
        "thinks": info.thinking is not None,
        "sampling": info.sampling,
    }
    return JSONResponse(about, headers={"Cache-Control": "no-store"})


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"
