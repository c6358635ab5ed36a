"""Several engine streams of one HTTP request as one, which ends early when the client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request

from echo_trt.gateway.upstream import Piece


class ClientGone(Exception):
    """Nobody is left to read the answer."""


async def merged(
    streams: Sequence[AsyncGenerator[Piece, None]], request: Request
) -> AsyncGenerator[tuple[int, Piece], None]:
    """(choice, piece) as they come. The first failure, or the client's leaving, ends and closes all streams.

    A client that reads slowly slows its own streams down: little is stored here.
    """
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(2 * len(streams))

    async def pump(choice: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await queue.put((choice, piece))
            await queue.put(None)
        except Exception as error:  # raised again by whoever reads
            await queue.put(error)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        await queue.put(ClientGone())

    pumps: list[asyncio.Task] = []

    async def start() -> None:
        for choice, stream in enumerate(streams):
            pumps.append(asyncio.create_task(pump(choice, stream)))
            await asyncio.sleep(0)  # opening one takes a millisecond, and there may be 128: other clients come between

    starter, watcher = asyncio.create_task(start()), asyncio.create_task(watch())
    try:
        running = len(streams)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        starter.cancel()
        watcher.cancel()  # not waited for: a server need not let go before the answer is complete
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
