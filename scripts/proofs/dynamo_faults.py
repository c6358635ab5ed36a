"""What can go wrong with workers behind NVIDIA Dynamo, brought about on the real thing; prints a table.

    python scripts/proofs/dynamo_faults.py bundles/smollm2-135m-fp32

Starts ``echo-trt serve BUNDLE --replicas 2`` on free ports of this machine and asks nothing of any other one; about 10
minutes on 2 cores, --only names some faults. Every answer is compared with what the same request got at rest: all must
be the same for a bundle in fp32. Exit code 1 if something is not as it must be. Needs pip install -e '.[test,dynamo]'
and pip install --no-deps ai-dynamo==1.6.1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ("", "plugins", "scripts/proofs", "tests/serving", "tests/dynamo")
sys.path[:0] = [str(ROOT / folder) for folder in HELPERS]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])

from cluster import NAME, Cluster, Reply  # noqa: E402
from serve_faults_parts.stage import Failed, expect, together  # noqa: E402

BATCH, QUEUE = 16, 16
SUBJECTS = ("the sea", "a clock", "bread", "the moon", "a small dog", "rain", "an old map", "tea")
PLACES = BATCH + QUEUE + 1  # of a worker; Dynamo itself holds one more


@dataclass
class Stage:
    """A cluster, and what its answers must be."""

    cluster: Cluster
    tokens: int  # of an answer
    expected: dict[int, Reply] = field(default_factory=dict)

    def ask(self, i: int, **more: Any) -> Reply:
        """Request i, to its end: its prompt, and greedy or with a seed of its own."""
        return self.cluster.ask(**(self.request(i) | more))

    def request(self, i: int) -> dict[str, Any]:
        drawn = {"temperature": 0.8, "seed": i} if i % 2 else {"temperature": 0}
        prompt = f"Number {i}. Write a story about {SUBJECTS[i % len(SUBJECTS)]}:"
        return {"prompt": prompt, "max_tokens": self.tokens, "ignore_eos": True, **drawn}

    def learn(self, number: int) -> None:
        """Remember the answers at rest."""
        missing = [i for i in range(number) if i not in self.expected]
        for i, reply in zip(missing, together(len(missing), 8, lambda n: self.ask(missing[n])), strict=True):
            expect(not reply.error and len(reply.token_ids) == self.tokens, f"an answer at rest is {reply}")
            self.expected[i] = reply

    def open(self, number: int) -> Streams:
        return Streams(self, number)

    def same(self, replies: dict[int, Reply]) -> str:
        """Whether each has all its tokens and no others. Raises Failed."""
        wrong = [i for i, reply in replies.items() if reply.error or reply.status != 200]
        expect(
            not wrong, f"{len(wrong)} of {len(replies)} ended with errors, such as {wrong and replies[wrong[0]].error}"
        )
        parted = [i for i, reply in replies.items() if reply.token_ids != self.expected[i].token_ids]
        expect(not parted, f"{len(parted)} of {len(replies)} texts are others: {parted}")
        return f"{len(replies)} texts as at rest"

    def whole(self, number: int = 2) -> None:
        """Wait until all is as in the beginning: workers listed, nothing open, no KV block in use."""
        self.cluster.wait_for_workers(number)

        def resting(metrics: dict[str, float]) -> bool:
            return not any(metrics[name] for name in ("echo_running", "echo_queued", "echo_blocks_used"))

        self.cluster.wait(lambda: all(resting(worker.metrics()) for worker in self.cluster.workers), 60)
        self.same({i: self.ask(i) for i in range(4)})

    def moves(self) -> int:
        return self.cluster.said.count("migration retry scheduled")


class Streams:
    """Requests 0 to ``number`` - 1, all open."""

    def __init__(self, stage: Stage, number: int):
        self._stage, self._begun = stage, threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(number)
        self._futures: list[Future[Reply]] = [self._pool.submit(self._read, i) for i in range(number)]
        for _ in range(number):
            expect(self._begun.acquire(timeout=120), "a stream does not begin")

    def _read(self, i: int) -> Reply:
        reply, told = Reply(), False
        try:
            for reply in self._stage.cluster.stream(**self._stage.request(i)):
                if reply.token_ids and not told:
                    told = True
                    self._begun.release()
        except httpx.HTTPError as error:
            reply.error = type(error).__name__
        if not told:
            self._begun.release()
        return reply

    def ended(self) -> dict[int, Reply]:
        return {i: future.result(300) for i, future in enumerate(self._futures)}


def pause(replies: dict[int, Reply]) -> float:
    """The longest time between two pieces of one answer, in seconds."""
    return max(float(np.diff(reply.times).max()) for reply in replies.values() if len(reply.times) > 1)


# -- the faults ------------------------------------------------------------------------------------------------------


def killed(stage: Stage) -> tuple[str, str]:
    stage.learn(32)
    before, streams = stage.moves(), stage.open(32)
    os.kill(stage.cluster.workers[0].pid, signal.SIGKILL)
    replies = streams.ended()
    told, moved = stage.same(replies), stage.moves() - before
    expect(moved, "no answer was open at the worker")
    stage.whole()
    return f"{moved} went on at the other worker after at most {pause(replies):.1f} s; {told}", "nothing"


def hung(stage: Stage) -> tuple[str, str]:
    stage.learn(32)
    streams, begin = stage.open(16), time.monotonic()
    os.kill(stage.cluster.workers[0].pid, signal.SIGSTOP)
    slowest = 0.0
    for i in range(8):
        asked = time.monotonic()
        expect(not stage.ask(i, max_tokens=8).error, "a request beside the hung worker ended with an error")
        slowest = max(slowest, time.monotonic() - asked)
    replies = streams.ended()
    told, longest = stage.same(replies), pause(replies)
    ended = time.monotonic() - begin
    stage.whole()
    return (
        f"killed and started again by the launcher; its answers stood for {longest:.0f} s and went on elsewhere, the "
        f"last was whole after {ended:.0f} s, new requests waited {slowest:.0f} s at most; {told}",
        "nothing",
    )


def frontend(stage: Stage) -> tuple[str, str]:
    stage.learn(16)
    streams, begin = stage.open(16), time.monotonic()
    os.kill(stage.cluster.frontend, signal.SIGKILL)
    replies = streams.ended()
    cut = sum(reply.error != "" for reply in replies.values())
    expect(cut, "no stream was open")
    stage.same({i: reply for i, reply in replies.items() if not reply.error})
    stage.cluster.wait(lambda: stage.cluster.models() == [NAME], 60)
    seconds = time.monotonic() - begin
    stage.whole()
    reply = stage.ask(0)
    cached = reply.usage["prompt_tokens_details"]["cached_tokens"]
    seen = f"started again, serving after {seconds:.1f} s; workers dropped what was open; {cached} tokens still cached"
    return seen, f"the {cut} open answers"


def folder(stage: Stage) -> tuple[str, str]:
    stage.learn(16)
    streams, begin = stage.open(16), time.monotonic()
    shutil.rmtree(stage.cluster.discovery / "v1")
    refused = served = 0
    outage = 0.0
    while served < 30:  # seconds of which every one must be good
        try:
            reply = stage.ask(0, max_tokens=4)
        except httpx.HTTPError as error:
            reply = Reply(error=str(error) or type(error).__name__)
        served = 0 if reply.error else served + 1
        if reply.error:
            refused, outage = refused + 1, time.monotonic() - begin
        expect(time.monotonic() - begin < 240, f"nothing is served any longer: {reply.error}")
        time.sleep(1)
    replies = streams.ended()
    told = stage.same(replies)
    stage.whole()
    seen = f"frontend started again once open answers had ended, served as before after {outage:.0f} s"
    return f"{seen} ({refused} tries refused meanwhile); {told}", "nothing that was open"


def joins(stage: Stage) -> tuple[str, str]:
    stage.learn(32)
    asked: dict[int, Reply] = {}
    done, served = threading.Event(), Counter()

    def client(first: int) -> None:
        i = first
        while not done.is_set():
            reply = stage.ask(i)
            asked[i] = reply
            served[reply.worker] += not reply.error
            i = (i + 16) % 32

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(client, i) for i in range(16)]
        joined = stage.cluster.join("--batch", BATCH, "--queue", QUEUE)
        try:
            stage.cluster.wait(lambda: len(stage.cluster.entries("mdc")) == 3)
            known, begin = set(served), time.monotonic()
            stage.cluster.wait(lambda: bool(set(served) - known), 120)
            seconds = time.monotonic() - begin
            joined.send_signal(signal.SIGTERM)  # and leaves again, under the same load
            expect(joined.wait(90) == 0, "the worker that joined did not leave with exit code 0")
        finally:
            done.set()
    for each in clients:
        each.result()
    told = stage.same(asked)
    stage.whole()
    total = served.total()
    return (
        f"its first answer was whole {seconds:.0f} s after it was listed, then it was drained; {total} answers, {told}",
        ("nothing"),
    )


def drained(stage: Stage) -> tuple[str, str]:
    stage.learn(32)
    before, streams = stage.moves(), stage.open(32)
    os.kill(stage.cluster.workers[0].pid, signal.SIGTERM)
    late = [stage.ask(i, max_tokens=8) for i in range(4)]
    expect(not any(reply.error for reply in late), "a request during the drain ended with an error")
    replies = streams.ended()
    told, moved = stage.same(replies), stage.moves() - before
    stage.whole()
    return (
        f"finished what it had, {moved} moved, longest pause {pause(replies):.1f} s; {told}; started again",
        "nothing",
    )


def full(stage: Stage) -> tuple[str, str]:
    stage.learn(32)
    number = 6 * PLACES
    answers = together(number, number, lambda i: stage.ask(i % 32))
    statuses = Counter(reply.status for reply in answers)
    expect(set(statuses) == {200, 529}, f"clients saw {dict(statuses)}")
    expect(statuses[200] >= 2 * BATCH, f"only {statuses[200]} were taken")
    whole = [(i, reply) for i, reply in enumerate(answers) if reply.status == 200]
    wrong = sum(reply.error != "" or reply.token_ids != stage.expected[i % 32].token_ids for i, reply in whole)
    expect(not wrong, f"{wrong} of {len(whole)} texts are others")
    stage.whole()
    return f"{statuses[529]} refused with 529, {len(whole)} answered, all as at rest", "the refused"


def slow(stage: Stage) -> tuple[str, str]:
    """Readers of a byte a second, beside others whose time a token is compared with that beside quick readers."""
    stage.learn(16)
    gaps: dict[bool, float] = {}
    for slowly in (False, True):
        done = threading.Event()
        threads = [threading.Thread(target=_sip, args=(stage, i, slowly, done)) for i in range(8)]
        for thread in threads:
            thread.start()
        replies = dict(enumerate(together(16, 8, stage.ask)))
        told = stage.same(replies)
        gaps[slowly] = float(np.median([np.ptp(r.times) / (stage.tokens - 1) for r in replies.values()]))
        done.set()
        for thread in threads:
            thread.join()
    ratio = gaps[True] / gaps[False]
    expect(ratio < 1.5, f"others wait {ratio:.2f} times as long")
    stage.whole()
    return f"8 others wait {ratio:.2f} times as long for a token as beside quick readers; {told}", "nothing"


def _sip(stage: Stage, i: int, slowly: bool, done: threading.Event) -> None:
    body = {"model": NAME, "stream": True, **stage.request(i)}
    with (
        httpx.Client(transport=httpx.HTTPTransport(socket_options=[(1, 8, 2048)]), timeout=120) as client,
        client.stream("POST", stage.cluster.url("completions"), json=body) as answer,
    ):
        for _ in answer.iter_raw(1 if slowly else None):
            if slowly and done.wait(1):
                return


def gone(stage: Stage) -> tuple[str, str]:
    stage.learn(4)
    workers = stage.cluster.workers
    before = sum(worker.metrics()["echo_emitted_tokens_total"] for worker in workers)

    def leave(i: int) -> None:
        for reply in stage.cluster.stream(**stage.request(i)):
            if reply.token_ids:
                return
        raise Failed("a stream ended before its client left")

    begin = time.monotonic()
    together(200, 24, leave)
    left = time.monotonic()
    stage.cluster.wait(lambda: not any(worker.metrics()["echo_blocks_used"] for worker in workers), 30)
    freed = time.monotonic() - left
    tokens = sum(worker.metrics()["echo_emitted_tokens_total"] for worker in workers) - before
    expect(tokens < 200 * stage.tokens / 2, "their answers were written to the end")
    stage.whole()
    return (
        f"all gone within {left - begin:.0f} s; no KV block in use {freed:.1f} s later, {tokens / 200:.0f} tokens each",
        ("nothing"),
    )


FAULTS: dict[str, tuple[str, Callable[[Stage], tuple[str, str]]]] = {
    "killed": ("kill -9 of a worker, 32 streams open", killed),
    "hung": ("SIGSTOP of a worker, 16 streams open", hung),
    "frontend": ("kill -9 of the frontend, 16 streams open", frontend),
    "folder": ("discovery folder removed, 16 streams open", folder),
    "joins": ("a worker joins and leaves, 16 clients asking", joins),
    "drained": ("SIGTERM of one worker of two, 32 streams open", drained),
    "full": (f"{6 * PLACES} requests at once for {2 * PLACES} places", full),
    "slow": ("8 readers of a byte a second", slow),
    "gone": ("200 clients leave after the first token", gone),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--only", default=",".join(FAULTS), help="faults, by commas, in the order given")
    options.add_argument("--tokens", type=int, default=128, help="of an answer")
    asked = options.parse_args()
    names = asked.only.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        options.error(f"--only names {unknown[0]!r}; choose from {', '.join(FAULTS)}")
    failed = []
    settings = "--batch", BATCH, "--queue", QUEUE
    with tempfile.TemporaryDirectory() as place, Cluster(asked.bundle, Path(place), *settings) as cluster:
        cluster.wait_for_workers(2)
        stage = Stage(cluster, asked.tokens)
        stage.learn(4)
        print("| fault | seen | lost | s |\n|---|---|---|---|", flush=True)
        for name in names:
            what, fault = FAULTS[name]
            begin = time.monotonic()
            try:
                seen, lost = fault(stage)
            except (Failed, AssertionError, httpx.HTTPError, OSError) as error:
                seen, lost = f"**FAILED**: {str(error)[-2000:]}", ""
                failed.append(name)
                cluster.wait_for_workers(2)
            print(f"| {what} (`{name}`) | {seen} | {lost} | {time.monotonic() - begin:.0f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
