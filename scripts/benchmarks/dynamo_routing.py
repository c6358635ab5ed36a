"""Conversations over two workers behind NVIDIA Dynamo: its KV router against round robin.

    python scripts/benchmarks/dynamo_routing.py bundles/smollm2-135m

40 conversations of four turns, three at once, greedy; each begins with a text of its own. Prints for both routers, each
on fresh workers: the share of prompt tokens that were cached, turns answered by the worker of the turn before, and the
time to the first token. Time is comparable on a quiet machine only; the other figures are so anywhere. About 5 minutes
on 2 cores. Needs pip install -e '.[test,dynamo]' -e ./lab and pip install --no-deps ai-dynamo==1.6.1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "plugins", "tests/engine/service", "tests/adapters/dynamo")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])

from cluster import Cluster  # noqa: E402

TURNS = 4
WORDS = [
    *("river", "stone", "market", "winter", "letter", "garden", "engine", "silver", "harbour", "candle", "meadow"),
    *("thunder", "bridge", "copper", "window", "forest", "pepper", "lantern", "valley", "needle", "orchard", "marble"),
]
ROUTERS = {"round robin": "round-robin", "KV router": "kv"}


@dataclass(frozen=True)
class Answer:
    prompt: int
    cached: int
    first: float  # seconds to the first token
    worker: int | None


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--conversations", type=int, default=40)
    options.add_argument("--at-once", type=int, default=3, help="an even number keeps step with two workers")
    options.add_argument("--words", type=int, default=120, help="of a conversation's first message")
    options.add_argument("--tokens", type=int, default=48, help="of an answer")
    requested = options.parse_args()
    print("| router | turn | prompt tokens cached | by the worker of the turn before | first token, median |")
    print("|---|---|---|---|---|")
    for name, mode in ROUTERS.items():
        talks = run(requested, mode)
        for turn in range(TURNS):
            print(f"| {name} | {turn + 1} | {figures(talks, [turn])} |")
        workers = Counter(answer.worker for talk in talks for answer in talk)
        print(f"| {name} | all | {figures(talks, range(TURNS))} |", flush=True)
        print(f"| | | answers by worker: {', '.join(map(str, workers.values()))} | | |", flush=True)


def run(requested: argparse.Namespace, mode: str) -> list[list[Answer]]:
    settings = {"DYN_ROUTER_MODE": mode}
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(requested.bundle, Path(folder), **settings) as cluster,
        ThreadPoolExecutor(requested.at_once) as pool,
    ):
        cluster.wait_for_workers(2)
        for warm in range(4):  # the first calls are slow
            hold(cluster, requested, -1 - warm)
        return list(pool.map(lambda number: hold(cluster, requested, number), range(requested.conversations)))


def hold(cluster: Cluster, requested: argparse.Namespace, number: int) -> list[Answer]:
    """One conversation, with its own beginning."""
    rng = np.random.default_rng(number + 1000)
    beginning = " ".join(rng.choice(WORDS, requested.words))
    messages = [{"role": "user", "content": f"Remember these words: {beginning}. What do they have in common?"}]
    answers = []
    for turn in range(TURNS):
        begin = time.monotonic()
        reply = cluster.chat(messages, max_tokens=requested.tokens, temperature=0, ignore_eos=True)
        if reply.error or reply.status != 200:
            sys.exit(f"error: a request ended with {reply.status} {reply.error}.")
        used = reply.usage
        cached = used["prompt_tokens_details"]["cached_tokens"]
        answers.append(Answer(used["prompt_tokens"], cached, reply.times[0] - begin, reply.worker))
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": f"And what of {WORDS[turn]} and {rng.choice(WORDS)}?"},
        ]
        time.sleep(0.3)  # a user reads; events reach the router
    return answers


def figures(talks: list[list[Answer]], turns: range | list[int]) -> str:
    chosen = [talk[turn] for talk in talks for turn in turns]
    cached = sum(answer.cached for answer in chosen) / sum(answer.prompt for answer in chosen)
    later = [talk[turn].worker == talk[turn - 1].worker for talk in talks for turn in turns if turn]
    home = f"{sum(later)} of {len(later)}" if later else "-"
    first = float(np.median([answer.first for answer in chosen]))
    return f"{cached:.0%} | {home} | {1e3 * first:.0f} ms"


if __name__ == "__main__":
    main()
