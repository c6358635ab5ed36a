"""What a user waits for while another one is served: gaps between tokens, and first tokens; several servers take turns.

    python scripts/benchmarks/second_user.py --rounds 3 \
        --server 'ours=python -m echo_trt serve bundles/coder --openai-port {port}' \
        --server 'llama.cpp=llama-server --model coder.gguf --parallel 8 --ctx-size 65536 --port {port}'

A reader's answer is being written. Then comes one long prompt of words at random, and 2 seconds later the short
question of a third user; or four chats come instead. Printed are the reader's longest gap between messages, the long
prompt's first token, and the short question's: the worst of all rounds, in seconds. Nothing else should run meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Annotated

import httpx
from cyclopts import Parameter

from echo_trt.engine.options import run_alone
from echo_trt_lab.load import started

STORY = "Write a very long story about a lighthouse keeper, in many chapters."
QUESTIONS = ("Why is the sky blue?", "Explain a hash table.", "What is a fjord?", "Write a poem about rain.")
WORDS = ["river", "stone", "cloud", "amber", "copper", "willow", "harbor", "lantern", "meadow", "thunder", "velvet"]
READ = 12  # messages that the reader has before others come
LATER = 2.0  # seconds from the long prompt to the short question
SETTLE = 3.0  # seconds after a scene, in which a server notices who has left


class Answer:
    """A streamed answer: when it was asked for, and when its messages came."""

    def __init__(self, client: httpx.AsyncClient, prompt: str, max_tokens: int, endless: bool = False):
        self.sent, self.times = time.perf_counter(), list[float]()
        self._client, self._body = client, {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
        self._body |= {"model": "echo", "max_tokens": max_tokens, "stream": True, "ignore_eos": endless}
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._client.stream("POST", "/v1/chat/completions", json=self._body) as reply:
            if reply.status_code != 200:
                raise SystemExit(f"error: {(await reply.aread()).decode()[:300]}")
            async for line in reply.aiter_lines():
                choices = json.loads(line[6:]).get("choices") if line.startswith("data: {") else None
                if choices and choices[0]["delta"].get("content"):
                    self.times.append(time.perf_counter())

    async def reached(self, messages: int) -> None:
        while len(self.times) < messages and not self.task.done():
            await asyncio.sleep(0.01)

    def first(self) -> float:
        return self.times[0] - self.sent

    def gap(self, begin: float, end: float) -> float:
        """Return the longest wait for a message of which a part is between two times."""
        return max(b - a for a, b in pairwise([*self.times, end]) if b >= begin and a <= end)


async def scene(url: str, kind: str, words: int, seed: int) -> dict[str, float]:
    """Play one scene; returns seconds."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        reader = Answer(client, f"{STORY} Number {seed}.", 2000, endless=True)
        await reader.reached(READ)
        begin, found = time.perf_counter(), dict[str, float]()
        if kind == "long":
            draw = random.Random(seed)
            prompt = "Summarise this: " + " ".join(draw.choice(WORDS) for _ in range(words))
            long = Answer(client, prompt, 4)
            await asyncio.sleep(LATER)
            short = Answer(client, f"{QUESTIONS[seed % 4]} Number {seed}.", 24)
            await asyncio.gather(long.reached(1), short.reached(1))
            found = {"first token of the long prompt": long.first(), "of a short question": short.first()}
            others = [long, short]
        else:
            others = [Answer(client, f"{each} Number {seed}.", 100) for each in QUESTIONS if kind == "chats"]
            await asyncio.gather(*(other.task for other in others), asyncio.sleep(LATER))
            if others:
                found = {"of a short question": max(other.first() for other in others)}
        if reader.task.done():
            raise SystemExit(f"error: {url} ended the reader's answer; it does not take ignore_eos")
        found["longest gap"] = reader.gap(begin, time.perf_counter())
        for each in (reader, *others):
            each.task.cancel()
        await asyncio.gather(*(each.task for each in (reader, *others)), return_exceptions=True)
    await asyncio.sleep(SETTLE)
    return found


def main(
    server: Annotated[list[str], Parameter(help="NAME=COMMAND of a server to start.")],
    words: Annotated[int, Parameter(help="Of the long prompt, 1.2 tokens each.")] = 6600,
    rounds: int = 2,
) -> None:
    """Print a table in markdown."""
    names = "longest gap", "of a short question", "first token of the long prompt"
    with ExitStack() as running:
        urls = {}
        for one in server:
            name, _, command = one.partition("=")
            urls[name] = running.enter_context(started(name, command))
        print(f"| server | beside | {' | '.join(names)} |\n{'|---' * (2 + len(names))}|", flush=True)
        worst: dict[tuple[str, str], dict[str, float]] = {}
        for number in range(rounds):
            for kind in ("nobody", "chats", "long"):
                for name, url in urls.items():
                    found = asyncio.run(scene(url, kind, words, number))
                    before = worst.setdefault((name, kind), found)
                    worst[name, kind] = {key: max(value, before[key]) for key, value in found.items()}
        for (name, kind), found in worst.items():
            cells = (f"{found[key]:.2f}" if key in found else "-" for key in names)
            print(f"| {name} | {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_alone(main)
