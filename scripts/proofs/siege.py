"""A supervised server under attack, and what another client gets meanwhile: a table; exit code 1 at a missed bound.

    python scripts/proofs/siege.py bundles/smollm2-135m

Each attack is what a single client can do: kept connections, unread answers, uploads, hostile grammars, floods, kills
(``siege_parts/attacks.py``). A victim with a key of its own asks all the while, alone first and then beside the attack.
None of its answers may be lost but one that was in flight at a kill; its tokens/s stay at least half, and its first
token comes in at most three times the time. The server's limit of open files is small, so that seconds are enough.
Everything stays on loopback. By hand and at a release. Needs pip install -e '.[test]' -e ./lab.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent)]

from siege_parts.attacks import ATTACKS, KILLS, Target  # noqa: E402

TOKENS = 24  # of a victim's answer; larger: rates are steadier, and a round takes longer
SLOWEST, LATEST = 0.5, 3.0  # of tokens/s, and of the first token's time, relative to alone
PATIENCE_S, START_S, RESTART_S = 60.0, 300.0, 90.0  # for an answer, for a start, and until a killed process is back
COLUMNS = ("attack", "first token", "tokens/s", "answers", "lost", "server", "missed")


@dataclass
class Felt:
    """What a victim got: seconds to first tokens, tokens per second behind them, and why answers were lost."""

    first: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A line of the table. first, rate: medians beside the attack relative to alone; None: there was no answer.

    server  "up", "restarted" or "down", at the end
    """

    attack: str
    first: float | None
    rate: float | None
    answers: int
    lost: int
    server: str

    @property
    def missed(self) -> list[str]:
        """Name the bounds that are missed."""
        kill = self.attack in KILLS
        found = ["lost"] * (self.lost > kill)
        found += ["first token"] * (not kill and (self.first is None or self.first > LATEST))
        found += ["tokens/s"] * (not kill and (self.rate is None or self.rate < SLOWEST))
        return found + ["server"] * (self.server == "down" or (self.server == "restarted" and not kill))

    def __str__(self) -> str:
        first, rate = (("-" if ratio is None else f"{ratio:.2f}") for ratio in (self.first, self.rate))
        return line((self.attack, first, rate, self.answers, self.lost, self.server, ", ".join(self.missed)))


def line(cells: Sequence[object]) -> str:
    widths = (20, 12, 10, 9, 6, 11, 0)
    return " ".join(
        f"{cell!s:{'<' if i in (0, 5, 6) else '>'}{width}}"
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def row(attack: str, alone: Felt, beside: Felt, server: str) -> Row:
    """Compare what a victim got alone with what it got beside an attack."""

    def ratio(values: list[float], before: list[float]) -> float | None:
        return statistics.median(values) / statistics.median(before) if values and before else None

    first, rate = ratio(beside.first, alone.first), ratio(beside.rates, alone.rates)
    return Row(attack, first, rate, len(beside.first), len(beside.lost), server)


class Server:
    """``echo-trt serve`` with keys for attacker and victim. ``files``: its limit of open files."""

    def __init__(self, bundle: Path, port: int, files: int, folder: Path):
        self.port, self.files = port, files
        self.attacker, self.victim = secrets.token_hex(16), secrets.token_hex(16)
        keys, self._log = folder / "keys", folder / "server.log"
        keys.touch(0o600)
        keys.write_text(f"{self.attacker}\n{self.victim}\n")
        words = ["-m", "echo_trt.cli.app", "serve", str(bundle), "--openai-port", str(port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *words, "--api-keys-file", str(keys)],
                stdout=log,
                stderr=log,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
            )
        self.process = psutil.Process(self._process.pid)
        if not self.recovers(START_S):
            sys.exit(f"the server does not start:\n{self._log.read_text(errors='replace')[-2000:]}")
        self.began = self.parts()

    def parts(self) -> dict[str, int]:
        """Return the processes of the server by their modules."""
        target = Target(self.port, "", self.process, 0, threading.Event())
        found = {module: target.child(module) for module in ("echo_trt.engine.process", "echo_trt.server")}
        return {module: process.pid for module, process in found.items() if process}

    def answer(self, felt: Felt, tokens: int = TOKENS) -> bool:
        """Ask as the victim does; note times, or why the answer is lost."""
        body = {"model": "echo", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True}
        body |= {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
        headers = {"Authorization": f"Bearer {self.victim}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        begin, first, last, text, done = time.monotonic(), 0.0, 0.0, 0, False
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                felt.lost.append(f"{reply.status} {reply.read(200).decode(errors='replace')}")
                return False
            for part in reply:
                last, done = time.monotonic(), done or part.strip() == b"data: [DONE]"
                if b'"content":"' in part.replace(b'"content":""', b""):
                    first, text = first or last, text + 1
                if b'"completion_tokens":' in part:
                    text = int(part.partition(b'"completion_tokens":')[2].partition(b",")[0].strip(b"} \n"))
        except (OSError, http.client.HTTPException) as error:
            felt.lost.append(repr(error))
            return False
        finally:
            connection.close()
        if not done or text != tokens:
            felt.lost.append(f"{text} of {tokens} tokens came")
            return False
        felt.first.append(first - begin)
        felt.rates.append((tokens - 1) / max(last - first, 1e-6))
        return True

    def asked(self, seconds: float) -> Felt:
        """Ask one answer after the other for so long, two at least, and give up at the third that is lost."""
        felt, end = Felt(), time.monotonic() + seconds
        while (time.monotonic() < end or len(felt.first) < 2) and len(felt.lost) < 3:
            self.answer(felt)
            time.sleep(0.05)
        return felt

    def recovers(self, seconds: float = RESTART_S) -> bool:
        """Say whether an answer comes within these seconds, while the supervisor lives."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            if self.answer(Felt(), 2):
                return True
            time.sleep(0.5)
        return False

    def besieged(self, name: str, seconds: float) -> Row:
        alone = self.asked(seconds / 2)
        target = Target(self.port, self.attacker, self.process, min(4096, self.files // 2), threading.Event())
        thread = threading.Thread(target=ATTACKS[name], args=(target,), daemon=True)
        thread.start()
        time.sleep(0 if name in KILLS else 1)
        beside = Felt()
        if name in KILLS:  # in flight is what had begun
            self.answer(beside, 400)
        else:
            beside = self.asked(seconds)
        target.stop.set()
        thread.join(PATIENCE_S)
        back = self.recovers()
        if name in KILLS and back:
            after = self.asked(seconds / 2)
            beside = Felt(after.first, after.rates, beside.lost + after.lost)
        state = "down" if not back else "up" if self.parts() == self.began else "restarted"
        self.began = self.parts()
        for reason in dict.fromkeys(beside.lost):
            print(f"    {name}: {reason[:160]}", file=sys.stderr)
        return row(name, alone, beside, state)

    def stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        if self._process.poll() is None:
            for process in (*self.process.children(True), self.process):
                with suppress(psutil.Error):
                    process.kill()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--only", default=",".join(ATTACKS), help=f"attacks, by commas: {', '.join(ATTACKS)}")
    options.add_argument("--seconds", type=float, default=12.0, help="of each attack")
    options.add_argument("--port", type=int, default=21700)
    options.add_argument(
        "--files", type=int, default=400, help="open files of the server; it takes half as connections"
    )
    requested = options.parse_args()
    names = requested.only.split(",")
    if unknown := set(names) - set(ATTACKS):
        options.error(f"--only has {min(unknown)}; give some of {', '.join(ATTACKS)}.")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the crowds of clients are this process's
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows: list[Row] = []
    print(line(COLUMNS))
    with tempfile.TemporaryDirectory(prefix="siege-") as folder:
        server = Server(requested.bundle, requested.port, requested.files, Path(folder))
        try:
            for name in names:
                rows.append(server.besieged(name, requested.seconds))
                print(rows[-1], flush=True)
                if rows[-1].server == "down":
                    server.stop()
                    server = Server(requested.bundle, requested.port, requested.files, Path(folder))
        finally:
            server.stop()
    sys.exit(any(each.missed for each in rows))


if __name__ == "__main__":
    main()
