"""What a store is worth, and what it survives: a table, and exit code 1 where a bound is missed.

    python scripts/proofs/store.py bundles/smollm2-135m --exact bundles/smollm2-135m-fp32
    python scripts/proofs/store.py bundles/smollm2-135m --only restart --triton

restart    first token of a prompt of 4,000 tokens: cold, warm in memory, after restarts of a real server
crossover  the disk's rate from which reading takes less than computing: predicted beside measured, and what is chosen
blocks     10,000 blocks: writing, size, and a server's start with them
kills      kill -9 while writing: of a process that does nothing else, and of a server's engine; needs --exact, as the
           next two do
full       a disk that is full (a tmpfs, which root alone can mount), and that has room again
damage     flipped bits in blocks and in the index, another version
learnt     tokens per pass of the first ten answers after a restart, with and without what was learnt
beside     other requests' tokens/s while all that they compute is written

Prompts are pieces of docs/. --exact names a bundle in fp32, whose texts may not differ by a token. By hand, on a quiet
machine. Needs pip install -e '.[test]' -e ./lab.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from echo_trt_lab.load import measure, started

sys.path[:0] = [str(Path(__file__).parent)]

from store_parts.harm import damage, full, kills  # noqa: E402
from store_parts.kept import ROOT, Kept, Row, prompts  # noqa: E402

from echo_trt.engine.llm import LLM  # noqa: E402
from echo_trt.engine.params import SamplingParams  # noqa: E402
from echo_trt.files.prompts import read_prompts  # noqa: E402
from echo_trt.files.store import StoredBlock  # noqa: E402

LONG = 4_000  # tokens of a prompt whose first token is awaited
LEAST_BESIDE = 0.97  # of other requests' tokens/s


def ask(url: str, ids: Sequence[int], tokens: int = 1) -> tuple[float, str]:
    """Return the seconds until an answer's first token, and its text."""
    begin, first, text = time.perf_counter(), 0.0, ""
    body = {"model": "echo", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begin
                text += json.loads(line[6:])["choices"][0]["text"]
    return first, text


def counted(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def written(url: str) -> None:
    """Wait until the store has what was asked."""
    before = -1.0
    while (now := counted(url, "echo_stored_bytes_total")) != before:
        before = now
        time.sleep(0.5)


def serve(bundle: Path, *words: str) -> str:
    return f"{sys.executable} -m echo_trt serve {bundle} --openai-port {{port}} --no-request-log {' '.join(words)}"


def forget_pages(folder: Path) -> None:
    """Let the next reading of a folder's files come from its disk."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} s"


def restart(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    texts = prompts(job.bundle, 2, job.tokens)
    door = "--triton --http-port {free} --grpc-port {free} --metrics-port {free}" if job.triton else ""
    command = serve(job.bundle, f"--store {folder / 'store'}", door)
    with started("cold", command) as url:
        cold, memory = ([ask(url, ids)[0] for ids in texts] for _ in range(2))
        written(url)
    yield f"{job.tokens} tokens, cold", median(cold), True
    yield f"{job.tokens} tokens, in memory", median(memory), True
    for name in ("after a restart", "after a restart, from the disk"):
        if "disk" in name:
            forget_pages(folder / "store")
        with started(name, command) as url:
            again = [ask(url, ids)[0] for ids in texts]
            blocks = int(counted(url, "echo_restored_blocks_total"))
        yield f"{job.tokens} tokens, {name}", f"{median(again)}, {blocks} blocks read", blocks > 0 and again < cold


def crossover(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    with closing(Kept(job.bundle, folder / "store")) as kept:
        kept.first(prompts(job.bundle, 1, 500, 9)[0])
        [ids], count = prompts(job.bundle, 1, job.tokens, 1), job.tokens // 32
        cold, memory = kept.first(ids), min(kept.first(ids) for _ in range(3))
        prefixes = kept.reopen()
        size = count * max(entry.bytes for entry in prefixes._store._known.values())
        predicted, measured = size / prefixes._seconds(count), size / (cold - memory)
        shown = f"{predicted / 1e6:.0f} MB/s predicted, {measured / 1e6:.0f} measured"
        yield f"crossover, {job.tokens} tokens", shown, 0.5 < predicted / measured < 2
        for factor in (0.5, 2.0):
            yield slowed(kept, ids, measured * factor, cold, size)


def slowed(kept: Kept, ids: Sequence[int], rate: float, cold: float, size: int) -> Row:
    """Ask again after a restart, from a disk of ``rate`` bytes per second, which is known."""
    prefixes = kept.reopen()
    prefixes._rate, read = rate, prefixes._store.read

    def slow(key: bytes, entry: StoredBlock) -> bytes | None:
        end, content = time.perf_counter() + entry.bytes / rate, read(key, entry)
        time.sleep(max(end - time.perf_counter(), 0))
        return content

    prefixes._store.read = slow  # type: ignore[method-assign]
    before = kept.llm.counters.restored_blocks
    seconds, reads = kept.first(ids), kept.llm.counters.restored_blocks > before
    other = cold if reads else size / rate
    shown = f"{'read' if reads else 'computed'} in {seconds:.2f} s, the other way takes {other:.2f} s"
    return f"  disk of {rate / 1e6:.0f} MB/s", shown, seconds < 1.2 * other


def blocks(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    store, count = folder / "store", job.blocks
    with closing(Kept(job.bundle, store)) as kept:
        assert kept.prefixes
        content = bytearray(os.urandom(len(kept.prefixes._buffers[1])))
        begin, cpu = time.perf_counter(), time.thread_time()
        for number in range(count):
            key = number.to_bytes(16, "big")
            content[:16] = key
            kept.prefixes._store.write(key, 1, number % 128, content, 0.05)
            if number % 128 == 127:
                kept.prefixes._store.commit()
        seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        speed = f"{1e3 * seconds / count:.2f} ms a block, of them {1e3 * cpu / count:.2f} of a processor's"
        yield f"{count} blocks written", speed, True
        kept.close()
        files = sum(file.stat().st_blocks * 512 for file in store.rglob("*") if file.is_file())
        yield f"{count} blocks on disk", f"{files / 1e9:.2f} GB for {count * len(content) / 1e9:.2f} GB", True
        forget_pages(store)
        begin = time.perf_counter()
        kept.reopen()
        opening = time.perf_counter() - begin
    yield "opening that store", f"{opening:.2f} s", opening < 1
    starts = []
    for words in (), (f"--store {store} --store-size 20G",):
        begin = time.perf_counter()
        with started("with" if words else "without", serve(job.bundle, *words)):
            starts.append(time.perf_counter() - begin)
    yield "start to first answer", f"{starts[1]:.1f} s, without a store {starts[0]:.1f} s", starts[1] < starts[0] + 2


def learnt(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Answers of 64 tokens to chats about pieces of docs/; other ones teach than those that are judged."""
    asked = [row.text for row in read_prompts(ROOT / "scripts/demo_prompts.jsonl")]
    words = _docs_texts(40)
    chats = [[{"role": "user", "content": text}] for text in [*asked, *words]]
    params = SamplingParams(max_tokens=64, temperature=0.0)

    def ten(llm: LLM) -> float:
        counters, before = llm.counters, (llm.counters.emitted_tokens, llm.counters.verifications)
        for chat in chats[:10]:
            llm.chat([chat], params)
        return (counters.emitted_tokens - before[0]) / (counters.verifications - before[1])

    fresh = ten(LLM(job.bundle, "goodput", batch=8))
    with closing(Kept(job.bundle, folder / "store", policy="goodput")) as kept:
        for chat in chats[10:]:
            kept.llm.chat([chat], params)
    with closing(Kept(job.bundle, folder / "store", policy="goodput")) as kept:
        later = ten(kept.llm)
    shown = f"{later:.3f}, without what was learnt {fresh:.3f} ({later / fresh:.3f})"
    yield "first ten answers, tokens per pass", shown, later > 0.99 * fresh


def _docs_texts(count: int) -> list[str]:
    pages = "\n\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    pieces = [piece for piece in pages.split("\n\n") if 200 < len(piece) < 800 and not piece.startswith("|")]
    return [f"Say in one sentence what this means: {piece}" for piece in random.Random(0).sample(pieces, count)]


def beside(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Streams that never repeat a prompt: all is written, and nothing is found."""
    tokenizer = Tokenizer.from_file(str(job.bundle / "tokenizer.json"))
    texts = [tokenizer.decode(ids) for ids in prompts(job.bundle, 4000, 200, 5)]
    with ExitStack() as running:
        servers = {"without": (), "with": (f"--store {folder / 'store'}",)}
        urls = {name: running.enter_context(started(name, serve(job.bundle, *w))) for name, w in servers.items()}
        size = 16
        rows = []
        for number in range(job.rounds):  # each round with prompts of its own
            part = texts[number * 4000 // job.rounds : (number + 1) * 4000 // job.rounds]
            rows += asyncio.run(measure(urls, part, [size], job.seconds, 1, 64))
    rates = {name: [row["tokens_per_s"] for row in rows if row["server"] == name] for name in urls}
    ratio = statistics.median(a / b for a, b in zip(rates["with"], rates["without"], strict=True))
    shown = f"{ratio:.3f} of {statistics.median(rates['without']):.0f} tokens/s"
    yield f"writing beside {size} streams", shown, ratio >= LEAST_BESIDE and not any(row["errors"] for row in rows)


PROOFS = {each.__name__: each for each in (restart, crossover, blocks, kills, full, damage, learnt, beside)}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--exact", type=Path, help="a bundle in fp32; without it its proofs are left out")
    options.add_argument("--only", default=",".join(PROOFS), help="proofs, by commas")
    options.add_argument("--triton", action="store_true", help="let Triton host the engine that is restarted")
    options.add_argument("--tokens", type=int, default=LONG, help="of the long prompt")
    options.add_argument("--blocks", type=int, default=10_000)
    options.add_argument("--kills", type=int, default=50, help="of a process that writes")
    options.add_argument("--engine-kills", type=int, default=12, help="of a server's engine, while it writes")
    options.add_argument("--rounds", type=int, default=6, help="of the servers' turns")
    options.add_argument("--seconds", type=float, default=10, help="of a turn")
    options.add_argument("--folder", type=Path, help="where stores are made; default: the system's temporary files")
    job, rows = options.parse_args(), list[Row]()
    logging.getLogger("echo_trt").addHandler(logging.NullHandler())  # what the store complains of is counted
    for name in job.only.split(","):
        if name in ("kills", "full", "damage") and not job.exact:
            continue
        with tempfile.TemporaryDirectory(prefix="echo-trt-store-", dir=job.folder) as folder:
            for row in PROOFS[name](job, Path(folder)):
                print(*row, sep="; ", file=sys.stderr, flush=True)
                rows.append(row)
    width = max(len(name) for name, *_ in rows)
    print("\n".join(f"{name:{width}}  {shown}{'' if good else '   MISSED'}" for name, shown, good in rows))
    return int(not all(good for *_, good in rows))


if __name__ == "__main__":
    sys.exit(main())
