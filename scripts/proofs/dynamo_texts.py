"""The same text through NVIDIA Dynamo, Triton, the gateway and the offline interface, whichever worker answers.

    python scripts/proofs/dynamo_texts.py bundles/smollm2-135m-fp32

24 chats, greedy and with a seed, 12 at once, on real servers that are started one after the other on free ports of this
machine; about 5 minutes on 2 cores. Prints a table; exit code 1 if a text of a bundle in fp32 differs. Needs
pip install -e '.[test,dynamo]' -e ./lab and pip install --no-deps ai-dynamo==1.6.1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ("", "plugins", "tests/engine/service", "tests/adapters/dynamo")
sys.path[:0] = [str(ROOT / folder) for folder in HELPERS]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])

from cluster import Cluster, Reply  # noqa: E402
from served import Served  # noqa: E402

from echo_trt import LLM, SamplingParams  # noqa: E402
from echo_trt.bundle.manifest import read_manifest  # noqa: E402

TASKS = (
    "Explain {} to a child.",
    "Write four lines of verse about {}.",
    "List three facts about {}.",
    "How would you teach {}?",
)
SUBJECTS = ("the tides", "bread", "prime numbers", "a violin", "photosynthesis", "chess")
CHATS = [[{"role": "user", "content": task.format(subject)}] for task in TASKS for subject in SUBJECTS]
KINDS = ("greedy", "seeded")
Texts = dict[str, list[str]]  # kind -> a text a chat


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--tokens", type=int, default=128, help="of an answer")
    requested = options.parse_args()
    whole = offline(requested.bundle, requested.tokens)
    with tempfile.TemporaryDirectory() as folder:
        ways = by_triton(requested.bundle, Path(folder), requested.tokens)
        ways |= by_dynamo(requested.bundle, Path(folder), requested.tokens)
    exact = read_manifest(requested.bundle).precision == "fp32"
    print("| way | " + " | ".join(whole) + " |\n|---|" + "---|" * len(whole))
    failed = False
    for way, texts in ways.items():
        counts = [sum(a == b for a, b in zip(texts[kind], whole[kind], strict=True)) for kind in whole]
        failed |= exact and min(counts) < len(CHATS)
        print(f"| {way} | " + " | ".join(f"{count} of {len(CHATS)} as offline" for count in counts) + " |")
    return int(failed)


def sampling(kind: str, i: int) -> dict[str, Any]:
    return {"temperature": 0} if kind == "greedy" else {"temperature": 0.8, "top_p": 0.95, "seed": 1000 + i}


def offline(bundle: Path, tokens: int) -> Texts:
    """Plain decoding, one request at a time."""
    llm = LLM(bundle, "autoregressive", 1)
    return {
        kind: [
            llm.chat(chat, SamplingParams(max_tokens=tokens, **sampling(kind, i)))[0].text
            for i, chat in enumerate(CHATS)
        ]
        for kind in KINDS
    }


def all_at_once(ask: Callable[[str, int], str]) -> Texts:
    with ThreadPoolExecutor(12) as pool:
        return {kind: list(pool.map(lambda i, kind=kind: ask(kind, i), range(len(CHATS)))) for kind in KINDS}


def by_triton(bundle: Path, folder: Path, tokens: int) -> dict[str, Texts]:
    """Triton's own endpoint, and the gateway before it."""
    served = Served(bundle, folder / "triton", triton=True).wait_for("serving", 300)

    def triton(kind: str, i: int) -> str:
        requested = {"text_input": CHATS[i][0]["content"], "chat": True, "max_tokens": tokens, **sampling(kind, i)}
        return str(served.generate(**requested)["text_output"])

    def gateway(kind: str, i: int) -> str:
        return chat(f"http://127.0.0.1:{served.openai}/v1", kind, i, tokens)

    try:
        return {"Triton": all_at_once(triton), "gateway": all_at_once(gateway)}
    finally:
        served.kill()


def chat(url: str, kind: str, i: int, tokens: int) -> str:
    body = {"model": "echo", "messages": CHATS[i], "max_tokens": tokens, **sampling(kind, i)}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=300)
    return str(answer.json()["choices"][0]["message"]["content"])


def by_dynamo(bundle: Path, folder: Path, tokens: int) -> dict[str, Texts]:
    workers: Counter[int | None] = Counter()

    def dynamo(kind: str, i: int) -> str:
        reply: Reply = cluster.chat(CHATS[i], max_tokens=tokens, **sampling(kind, i))
        workers[reply.worker] += 1
        return reply.error or reply.text

    with Cluster(bundle, folder) as cluster:
        cluster.wait_for_workers(2)
        texts = all_at_once(dynamo)
    return {f"Dynamo, {shares(list(workers.values()))} by its two workers": texts}


def shares(counts: Sequence[int]) -> str:
    return " and ".join(map(str, counts))


if __name__ == "__main__":
    sys.exit(main())
