"""What those who look on cost: python scripts/benchmarks/viewers.py http://localhost:9000

Keeps 32 streams open at a running server, and measures windows of some seconds with 0, 1 and 10 viewers of its live
page's stream, in turns. Prints tokens a second by viewers, and the ratio to the windows without one of the same round.
"""

from __future__ import annotations

import asyncio
import re
import statistics
from contextlib import suppress
from typing import Annotated

import httpx
import typer

VIEWERS = (0, 1, 10)
SETTLE_S = 1.5  # between a change of viewers and the window; larger: cleaner windows, a longer run
PROMPTS = ("Why is the sky blue?", "Explain how a bicycle stays upright.", "List ten facts about the moon.")


async def stream(client: httpx.AsyncClient, number: int) -> None:
    """Keep one stream open for ever."""
    while True:
        body = {
            "model": "echo",
            "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
            "max_tokens": 192,
            "temperature": 0.7,
            "seed": number,
            "ignore_eos": True,
            "stream": True,
        }
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for _ in reply.aiter_raw():
                pass
        number += 97


async def view(client: httpx.AsyncClient) -> None:
    """Look on for ever."""
    async with client.stream("GET", "/live") as reply:
        reply.raise_for_status()
        async for _ in reply.aiter_raw():
            pass


async def tokens(client: httpx.AsyncClient) -> float:
    """Tokens that the server has emitted so far."""
    text = (await client.get("/metrics")).text
    return float(re.findall(r"^echo_emitted_tokens_total\S* (\S+)$", text, re.MULTILINE)[0])


async def rate(client: httpx.AsyncClient, viewers: int, seconds: float) -> float:
    """Tokens a second while so many look on."""
    looking = [asyncio.create_task(view(client)) for _ in range(viewers)]
    await asyncio.sleep(SETTLE_S)
    clock = asyncio.get_running_loop().time
    begin, before = clock(), await tokens(client)
    await asyncio.sleep(seconds)
    after, end = await tokens(client), clock()
    for task in looking:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return (after - before) / (end - begin)


async def measure(url: str, streams: int, rounds: int, seconds: float) -> dict[int, list[float]]:
    """Rates by viewers, a round after the other; the order turns."""
    rates: dict[int, list[float]] = {viewers: [] for viewers in VIEWERS}
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        load = [asyncio.create_task(stream(client, i)) for i in range(streams)]
        await asyncio.sleep(2 * SETTLE_S)
        for number in range(rounds):
            turn = number % len(VIEWERS)
            for viewers in VIEWERS[turn:] + VIEWERS[:turn]:
                rates[viewers].append(await rate(client, viewers, seconds))
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    return rates


def main(
    url: Annotated[str, typer.Argument(help="The gateway's.")],
    streams: Annotated[int, typer.Option(min=1, help="Requests open at once.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Windows for each number of viewers.")] = 9,
    seconds: Annotated[float, typer.Option(min=1, help="Of a window.")] = 8.0,
) -> None:
    rates = asyncio.run(measure(url, streams, rounds, seconds))
    print(f"{streams} streams, {rounds} rounds of {seconds:g} s")
    for viewers, found in rates.items():
        ratios = [own / bare for own, bare in zip(found, rates[0], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"{viewers:3} viewers  {statistics.median(found):8.1f} tokens/s  {statistics.median(ratios):.3f} ({spread})"
        )


if __name__ == "__main__":
    typer.run(main)
