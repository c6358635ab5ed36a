"""One question to an engine's host, from a thread without an event loop."""

from __future__ import annotations

import asyncio

from waiting import PATIENCE

from echo_trt.engine.process import wire
from echo_trt.engine.request import Event


def ask(path: str, question: wire.ToEngine, seconds: float = PATIENCE) -> wire.FromEngine | None:
    """Ask one question and return the last message of its answer; None where it does not come in time."""
    try:
        return asyncio.run(_asked(path, question, seconds))
    except (OSError, TimeoutError):
        return None


async def _asked(path: str, question: wire.ToEngine, seconds: float) -> wire.FromEngine | None:
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(wire.framed(question))
            answer = await wire.read_answer(reader)
            while isinstance(answer, Event) and not answer.reason:
                answer = await wire.read_answer(reader)
            return answer
        finally:
            writer.close()
