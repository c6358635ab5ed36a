"""Rounds through the whole server in this process: service, host, client and door, with the default policy.

Every answer is compared with the same body's that decodes plainly, asked alone of the same door behind the crowd.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from driving import assert_all_free
from fuzz_parts.crowds import Pair, default_llm
from fuzz_parts.declared import drawn_body
from server.running import Door
from waiting import wait_until

from echo_trt.engine import params
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.process import wire
from echo_trt.engine.process.host import Host
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.engine.service.service import Service
from echo_trt.server import app, schemas

DOOR_S = 2.0  # that clients of a round ask for; larger: fewer rounds
CLIENTS = 6
FULL, ROOMY = 2, 2 * CLIENTS * schemas.CHOICES  # places of a queue: full now and then, and never
SCALE = 64  # by which limits of bytes and of entries are smaller than in a server
BUSY = (429, 503)
#: Fields that may change no text, and values with which a request is answered whole and alone.
ALONE: dict[str, Any] = {"speculate": False, "stream": False}
ALONE |= dict.fromkeys(("latency", "priority", "deadline_ms", "cache_salt"))


def scale_limits() -> None:
    """Scale the wire's largest message, and with it how many log-probabilities one request may ask for."""
    wire.LARGEST //= SCALE
    scaled = {name: getattr(params, name) // SCALE for name in ("MAX_PROMPT_LOGPROBS", "MAX_ANSWER_LOGPROBS")}
    for module in (params, schemas, app):  # each has names of its own for them
        vars(module).update({name: bound for name, bound in scaled.items() if name in vars(module)})


@contextmanager
def served(llm: LLM, bundle: Path, queue: int) -> Iterator[tuple[Service, Door]]:
    """Serve an LLM on a socket, and a door before it."""
    service = Service(llm, queue)
    host = Host(service, bundle, EngineMetrics("echo"))
    folder, loop, stop = Path(tempfile.mkdtemp()), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(host.serve(folder / "engine", stop),), daemon=True)
    thread.start()
    try:
        wait_until(lambda: _accepts(folder / "engine"))
        door = Door(folder / "engine")
        try:
            yield service, door
        finally:
            door.kill()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        service.close(0)
        shutil.rmtree(folder)


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def answered(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[int, dict[int, dict[str, Any]], str]:
    """Ask; return the status, choices by their index as text, tokens' log-probabilities and reason, and what came."""
    reply = client.post(path, json=body)
    choices: dict[int, dict[str, Any]] = {}
    if reply.status_code != 200:
        return reply.status_code, choices, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]" or '"error"' in lines[-1], lines[-1]
        events = [json.loads(line) for line in lines if line != "[DONE]"]
    else:
        events = [reply.json()]
    for event in events:
        if "error" in event:
            return 504 if event["error"].get("code") == "deadline" else 500, choices, json.dumps(event)
        for choice in event["choices"]:
            known = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "reason": None})
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            known["text"] += said.get("content") or ""
            for call in said.get("tool_calls") or ():
                known["text"] += (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
            logprobs = choice.get("logprobs") or {}
            known["logprobs"] += logprobs.get("token_logprobs") or [e["logprob"] for e in logprobs.get("content") or ()]
            known["reason"] = choice.get("finish_reason") or known["reason"]
    return 200, choices, reply.text


def same(got: dict[int, dict[str, Any]], want: dict[int, dict[str, Any]], late: bool) -> bool:
    """Compare choices; of a request whose deadline has passed only texts, as far as they came."""
    if not late and got.keys() != want.keys():
        return False
    for index, choice in got.items():
        whole = want[index]
        if late:
            if not whole["text"].startswith(choice["text"]):
                return False
            continue
        entries = [*zip(choice["logprobs"], whole["logprobs"], strict=False)]
        close = all(a == b if None in (a, b) else math.isclose(a, b, abs_tol=1e-3) for a, b in entries)
        if not close or len(choice["logprobs"]) != len(whole["logprobs"]):
            return False
        if any(choice[name] != whole[name] for name in ("text", "reason")):
            return False
    return True


def _attack(path: Path, draw: random.Random, end: float) -> None:
    """Be a bad client of the engine's own socket: send no messages, half of them, or ask and read nothing."""
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.settimeout(0.5)
            client.connect(str(path))
            details = SamplingParams(60, ignore_eos=True, logprobs=20)
            asked = b"".join(wire.framed(wire.Submit(i, prompt=[70] * 9, params=details)) for i in range(3))
            junk = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\3abc", draw.randbytes(99), asked[:-7], asked, asked))
            client.sendall(junk)
            time.sleep(draw.random())


def of_door(draw: random.Random, pair: Pair) -> None:
    """Ask the door from threads with every field that it declares, and leave now and then; compare every answer."""
    llm, queue = default_llm(draw, pair), draw.choice((ROOMY, ROOMY, ROOMY, FULL))
    end = time.monotonic() + DOOR_S

    def client(own: random.Random) -> list[tuple[str, dict[str, Any], int, dict[int, dict[str, Any]], str]]:
        found = []
        with httpx.Client(base_url=f"http://127.0.0.1:{door.openai}", timeout=300) as asking:
            while time.monotonic() < end:
                path, body = drawn_body(own)
                if own.random() < 0.1:  # it leaves
                    with suppress(httpx.TimeoutException):
                        asking.post(path, json=body, timeout=own.random() * 0.05)
                    continue
                found.append((path, body, *answered(asking, path, body)))
        return found

    with served(llm, pair.roomy, queue) as (service, door):
        if draw.random() < 0.5:
            own = random.Random(draw.random())
            threading.Thread(target=_attack, args=(door.engine, own, end), daemon=True).start()
        with ThreadPoolExecutor(CLIENTS) as threads:
            lists = threads.map(client, [random.Random(draw.random()) for _ in range(CLIENTS)])
            asked = [each for found in lists for each in found]
        wait_until(lambda: time.monotonic() > end and not service.statistics().running)
        service_failures = service.statistics().engine_failures
        assert service_failures == 0, f"{service_failures} failures of an engine that did not fail"
        with httpx.Client(base_url=f"http://127.0.0.1:{door.openai}", timeout=300) as asking:
            for path, body, status, got, text in asked:
                pair.counts[f"door: {status}"] += 1
                if status in BUSY:
                    assert queue == FULL, (status, body, text)
                    continue
                alone = {name: value for name, value in (body | ALONE).items() if value is not None}
                alone.pop("stream_options", None)
                wanted, want, other = answered(asking, path, alone)
                late = body.get("deadline_ms", 10**9) < 10**6  # it may end at any token, or before the first one
                if status == 400:
                    assert json.loads(text)["error"]["param"], f"a refusal names no field: {text}"
                ended = late and status in (200, 504)
                assert ended or wanted == status < 500, (path, body, status, text[:2000], wanted, other[:2000])
                assert same(got, want, late), (path, body, got, want)
    assert_all_free(llm.loop)
