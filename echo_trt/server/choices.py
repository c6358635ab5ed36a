"""The engine's streams of one HTTP request as one, which ends early when the client hangs up."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from starlette.requests import Request

from echo_trt.engine.process.client import EngineError
from echo_trt.engine.text.entries import LogprobEntry
from echo_trt.server.errors import ApiError, from_engine
from echo_trt.server.text_client import Question, TextPiece

PieceStream = AsyncGenerator[tuple[int, TextPiece], None]


class ClientGone(Exception):
    """Nobody is left to read the answer."""


async def answered(request: Request, question: Question, names: Mapping[str, str]) -> AsyncGenerator[TextPiece]:
    """Yield one choice's pieces, whose ``completion_tokens`` are those so far. Raises ApiError, in terms of ``names``.

    A deadline ends a text as a limit does; where there is no text, the request has failed.
    """
    state, begin, tokens = request.app.state, time.monotonic(), 0
    try:
        async with aclosing(state.client.answer(question)) as pieces:
            async for piece in pieces:
                if question.submit.streamed and not tokens:
                    state.metrics.first_text.observe(time.monotonic() - begin)
                tokens += len(piece.token_ids)
                if not piece.finish_reason:
                    piece.completion_tokens = tokens
                elif piece.finish_reason == "deadline":
                    if not piece.completion_tokens:
                        message = "The request's deadline passed before it was finished."
                        raise ApiError(504, message, "server_error", code="deadline")
                    piece.finish_reason = "length"
                yield piece
    except EngineError as error:
        raise from_engine(error.failure, names) from None


async def prompts_alone(pieces: PieceStream) -> PieceStream:
    """Yield one piece per choice: the echoed prompt and its log-probabilities, without the token that follows."""
    texts: dict[int, str] = defaultdict(str)
    logprobs: dict[int, list[LogprobEntry]] = defaultdict(list)
    async with aclosing(pieces):
        async for choice, piece in pieces:
            texts[choice] += piece.text
            logprobs[choice] += piece.logprobs
            if piece.finish_reason:
                piece.text, own = texts[choice], logprobs[choice][: piece.prompt_tokens]
                if answer := logprobs[choice][piece.prompt_tokens :]:
                    piece.text = piece.text[: answer[0].offset]
                piece.logprobs, piece.sources, piece.token_ids, piece.completion_tokens = own, [], [], 0
                yield choice, piece


async def merged(request: Request, choices: Sequence[Question], names: Mapping[str, str]) -> PieceStream:
    """Yield (choice, piece) as they come. The first failure, or the client's leaving, ends and closes all streams.

    What a slow client has not read waits in its question's queue (``engine.process.client``), at most a whole answer:
    the engine goes on.
    """
    queue: asyncio.Queue[tuple[int, TextPiece] | Exception | None] = asyncio.Queue(2 * len(choices))

    async def pump(choice: int, stream: AsyncGenerator[TextPiece]) -> None:
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
        for choice, question in enumerate(choices):
            pumps.append(asyncio.create_task(pump(choice, answered(request, question, names))))
            await asyncio.sleep(0)  # opening one takes time, and there may be 128: other clients come between

    starter, watcher = asyncio.create_task(start()), asyncio.create_task(watch())
    try:
        running = len(choices)
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
