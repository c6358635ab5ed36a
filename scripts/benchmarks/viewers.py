"""What those who look on cost: python scripts/benchmarks/viewers.py http://localhost:9000

Keeps 32 streams open at a running server of this machine, and measures windows of some seconds with 0, 1 and 10 viewers
of its live page's stream, in turns. Prints tokens per second by viewers, the ratio to the windows without one of the
same round, and the share of one core that the viewers cost: the gateway's CPU time beyond that without viewers, and the
engine's for snapshots. That share is exact where the ratios of a noisy machine are not.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

import httpx
import psutil
from cyclopts import Parameter

from echo_trt.engine.options import bounds, run_alone
from echo_trt.errors import UserError

VIEWERS = (0, 1, 10)
SETTLE_S = 1.5  # between a change of viewers and the window; larger: cleaner windows, a longer run
PROMPTS = ("Why is the sky blue?", "Explain how a bicycle stays upright.", "List ten facts about the moon.")


@dataclass
class Window:
    """A window's tokens per second, and CPU seconds per second of the gateway and of snapshots."""

    rate: float
    gateway: float
    snapshots: float


@dataclass
class Viewer:
    """One who looks on; ``snapshots`` are the engine's CPU seconds for snapshots, at each that came."""

    snapshots: list[float] = field(default_factory=list)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Look on for ever."""
        async with client.stream("GET", "/live") as reply:
            reply.raise_for_status()
            event = ""
            async for line in reply.aiter_lines():
                name, _, value = line.partition(": ")
                event = value if name == "event" else event
                if name == "data" and event == "snapshot":
                    self.snapshots.append(json.loads(value)["seconds"]["snapshots"])


def gateway_at(url: str) -> psutil.Process:
    """Find the process of this machine that listens where ``url`` says."""
    port = urlsplit(url).port or 80
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise UserError(f"no process of this machine listens at port {port}; start echo-trt serve here.")


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


async def tokens(client: httpx.AsyncClient) -> float:
    """Tokens that the server has emitted so far."""
    text = (await client.get("/metrics")).text
    return float(re.findall(r"^echo_emitted_tokens_total\S* (\S+)$", text, re.MULTILINE)[0])


async def window(client: httpx.AsyncClient, gateway: psutil.Process, viewers: int, seconds: float) -> Window:
    """Measure while so many look on. One of them reads what it gets; the others would take this process's time."""
    first = Viewer()
    looking = [asyncio.create_task(first.look(client))] if viewers else []
    looking += [asyncio.create_task(drain(client)) for _ in range(viewers - 1)]
    await asyncio.sleep(SETTLE_S)
    clock = asyncio.get_running_loop().time
    begin, before, cpu, known = clock(), await tokens(client), sum(gateway.cpu_times()[:2]), len(first.snapshots)
    await asyncio.sleep(seconds)
    after, end, cpu = await tokens(client), clock(), sum(gateway.cpu_times()[:2]) - cpu
    for task in looking:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    reported = first.snapshots[known:]
    spent = reported[-1] - reported[0] if reported else 0.0
    return Window((after - before) / (end - begin), cpu / (end - begin), spent / (end - begin))


async def drain(client: httpx.AsyncClient) -> None:
    """Look on for ever, without a look."""
    async with client.stream("GET", "/live") as reply:
        reply.raise_for_status()
        async for _ in reply.aiter_raw():
            pass


async def measure(url: str, streams: int, rounds: int, seconds: float) -> dict[int, list[Window]]:
    """Windows by viewers, a round after the other; the order turns."""
    windows: dict[int, list[Window]] = {viewers: [] for viewers in VIEWERS}
    gateway = gateway_at(url)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        load = [asyncio.create_task(stream(client, i)) for i in range(streams)]
        await asyncio.sleep(2 * SETTLE_S)
        for number in range(rounds):
            turn = number % len(VIEWERS)
            for viewers in VIEWERS[turn:] + VIEWERS[:turn]:
                windows[viewers].append(await window(client, gateway, viewers, seconds))
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    return windows


def main(
    url: Annotated[str, Parameter(help="The gateway's.")],
    streams: Annotated[int, Parameter(validator=bounds(1), help="Requests open at once.")] = 32,
    rounds: Annotated[int, Parameter(validator=bounds(1), help="Windows for each number of viewers.")] = 9,
    seconds: Annotated[float, Parameter(validator=bounds(1), help="Of a window.")] = 8.0,
) -> None:
    windows = asyncio.run(measure(url, streams, rounds, seconds))
    print(f"{streams} streams, {rounds} rounds of {seconds:g} s")
    for viewers, found in windows.items():
        ratios = [own.rate / bare.rate for own, bare in zip(found, windows[0], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        gateway = mean([w.gateway for w in found]) - mean([w.gateway for w in windows[0]])
        print(
            f"{viewers:3} viewers  {statistics.median([w.rate for w in found]):8.1f} tokens/s  "
            f"{statistics.median(ratios):.3f} ({spread})  of a core: gateway {gateway:.2%}, "
            f"snapshots {mean([w.snapshots for w in found]):.2%}"
        )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    run_alone(main)
