"""What a store survives: kill -9, a full disk, flipped bits, another version. Nothing is lost but warmth."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from store_parts.kept import GREEDY, SHORT, Kept, Row, prompts

from echo_trt.engine import stored_prefixes
from echo_trt.engine.process import wire
from echo_trt.engine.process.client import Client
from echo_trt.files.store import Store

#: Writes blocks of a megabyte whose content tells their key, over and over, and says which were committed.
WRITER = """
import sys
from itertools import count
from pathlib import Path
from echo_trt.files.store import Store
store = Store(Path(sys.argv[1]), 150_000_000, b"a" * 16)
for i in count(int(sys.argv[2])):
    key = (i % 400).to_bytes(16, "big")
    store.write(key, i % 2, i, key * 65536, 1.0)
    if i % 8 == 7:
        store.commit()
        print(i, flush=True)
"""


def killed_writers(times: int, folder: Path) -> Iterator[Row]:
    """Kill a process that does nothing but write, evict and commit, and read all that it has left."""
    reached = wrong = lost = left = 0
    for number in range(times):
        command = [sys.executable, "-c", WRITER, str(folder), str(reached)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for _ in range(4):
                process.stdout.readline()
            time.sleep(random.Random(number).random() * 0.02)
            process.kill()
            reached += 32
        store = Store(folder, 150_000_000, b"a" * 16)
        for i in range(400):
            key = i.to_bytes(16, "big")
            if entry := store.find(key):
                content = store.read(key, entry)
                wrong += content not in (None, key * 65536)
                left += 1
        lost += store.damaged
        store.close()
    shown = f"{wrong} wrong blocks, {lost} damaged, {left // times} left each time"
    yield f"{times} kills of a writer", shown, not wrong


class Process:
    """An engine's process, asked on its socket."""

    def __init__(self, bundle: Path, folder: Path, *words: str):
        self._socket = folder / "engine"
        self._socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "echo_trt.engine.process", str(bundle), "--socket", str(self._socket), *words]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not self._socket.exists():
            if self._process.poll() is not None:
                raise SystemExit("the engine's process does not start.")
            time.sleep(0.05)

    def answer(self, ids: Sequence[int]) -> list[int]:
        async def asked() -> list[int]:
            client = Client(self._socket)
            events = client.submit(wire.Submit(prompt=list(ids), params=GREEDY))
            tokens = [token async for event in events for token in event.token_ids]
            await client.close()
            return tokens

        return asyncio.run(asked())

    def restored(self) -> int:
        async def scraped() -> str:
            client = Client(self._socket)
            text = await client.metrics()
            await client.close()
            return text or ""

        lines = asyncio.run(scraped()).splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("echo_restored_blocks_total"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def kills(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    yield from killed_writers(job.kills, folder / "written")
    texts, draw, engine = prompts(job.exact, job.engine_kills, SHORT), random.Random(0), Process(job.exact, folder)
    expected = [engine.answer(ids) for ids in texts]
    engine.kill()
    wrong = restored = 0
    for number in range(job.engine_kills):
        engine = Process(job.exact, folder, "--store", str(folder / "store"))
        for other in [*draw.sample(range(number), min(2, number)), number]:
            wrong += engine.answer(texts[other]) != expected[other]
        restored += engine.restored()
        time.sleep(draw.random() * 0.05)  # the answer's blocks are being written
        engine.kill()
    shown = f"{wrong} wrong texts, {restored} blocks read afterwards"
    yield f"{job.engine_kills} kills of an engine", shown, not wrong and (restored > 0 or job.engine_kills < 3)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler, log = Handler(logging.WARNING), logging.getLogger("echo_trt")
    log.addHandler(handler)
    yield told
    log.removeHandler(handler)


def full(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    disk, texts, stored_prefixes.REST = folder / "disk", prompts(job.exact, 12, SHORT), 0.2
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], check=False).returncode:
        yield "a full disk", "not tried: no tmpfs can be mounted", False
        return
    try:
        with _warnings() as told, closing(Kept(job.exact, disk)) as kept:
            expected = [kept.answer(ids) for ids in texts]
            kept.reopen()
            wrong = sum(kept.answer(ids) != text for ids, text in zip(texts, expected, strict=True))
            refused = sum("takes nothing" in message for message in told)
            read = kept.llm.counters.restored_blocks
            yield (
                "a full disk",
                f"{wrong} wrong texts, {refused} refusals, {read} blocks read",
                not wrong and refused > 0,
            )
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            for _ in range(2):
                kept.reopen()
                wrong = sum(kept.answer(ids) != text for ids, text in zip(texts, expected, strict=True))
            more = kept.llm.counters.restored_blocks - read
            yield "  that has room again", f"{wrong} wrong texts, {more} blocks read", not wrong and more > 2 * read
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def damage(job: argparse.Namespace, folder: Path) -> Iterator[Row]:
    texts, draw, store = prompts(job.exact, 3, SHORT), random.Random(0), folder / "store"

    def flip(file: Path) -> None:
        whole = bytearray(file.read_bytes())
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(whole)

    with closing(Kept(job.exact, store)) as kept:
        expected = [kept.answer(ids) for ids in texts]

        def round_of(damaged: Sequence[Path]) -> tuple[int, int]:
            """Close the store, flip a bit of each file, open it; return wrong texts, and blocks read."""
            kept.close()
            for file in damaged:
                flip(file)
            kept.reopen()
            before = kept.llm.counters.restored_blocks
            wrong = sum(kept.answer(ids) != text for ids, text in zip(texts, expected, strict=True))
            return wrong, kept.llm.counters.restored_blocks - before

        kept.close()
        files = sorted((store / "blocks").iterdir())
        some = [round_of(draw.sample(files, 5)) for _ in range(10)]
        shown = f"{sum(wrong for wrong, _ in some)} wrong texts, {sum(read for _, read in some)} blocks read"
        yield "bits flipped in 50 blocks", shown, not any(wrong for wrong, _ in some)
        indexes = [round_of([store / "index.db"]) for _ in range(12)]
        shown = f"{sum(wrong for wrong, _ in indexes)} wrong texts, {sum(read for _, read in indexes)} blocks read"
        yield "bits flipped in the index, 12 times", shown, not any(wrong for wrong, _ in indexes)
        version, stored_prefixes.__version__ = stored_prefixes.__version__, "0.0"
        wrong, read = round_of(())
        stored_prefixes.__version__ = version
        yield "another version", f"{wrong} wrong texts, {read} blocks read", not wrong and not read
