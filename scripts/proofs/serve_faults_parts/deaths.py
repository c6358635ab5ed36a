"""Processes that die under load, and the end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from serve_faults_parts.stage import PROMPTS, Row, Stage, expect, whole_text

STREAMS = 32
BACKEND, SERVER = "triton_python_backend_stub", "tritonserver"


def backend_killed(stage: Stage) -> Row:
    return _killed(stage, BACKEND, "the backend process")


def server_killed(stage: Stage) -> Row:
    return _killed(stage, SERVER, "Triton")


def gateway_killed(stage: Stage) -> Row:
    """Triton's own clients do not notice."""
    crowd = stage.crowd(_streams(stage))
    crowd.running(1)
    before = stage.server.err.count("serving again after")
    os.kill(_gateway(stage), signal.SIGKILL)
    took = stage.restarted(before + 1)
    whole, errors = crowd.ended()
    expect(not errors, f"Triton's clients had errors: {dict(errors)}")
    status, body = stage.gateway(b'{"model": "echo", "prompt": "a", "max_tokens": 1}', "/v1/completions")
    expect(status == 200, f"the gateway says {status} {body[:100]!r}")
    told = f"started again after {took}; {len(whole)} answers of Triton's own clients whole; {stage.answers_right()}"
    return Row("kill -9 of the gateway under load", told, "answers open at the gateway, as broken connections")


def _gateway(stage: Stage) -> int:
    for pid in stage.server.children("python"):
        if b"echo_trt.gateway" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("there is no gateway")


def _killed(stage: Stage, name: str, what: str) -> Row:
    """Clients get an answer or an error, none waits for ever, and the server is back by itself."""
    number = _streams(stage)
    before = stage.server.err.count("serving again after")
    crowd = stage.crowd(number)
    crowd.running(min(number, stage.batch) // 2)
    begin = time.monotonic()
    (victim,) = stage.server.children(name)
    os.kill(victim, signal.SIGKILL)
    whole, errors = crowd.ended()
    known = time.monotonic() - begin
    took = stage.restarted(before + 1)
    expect(errors, f"{what} was killed too late")
    state = stage.answers_right()
    backends, regions = stage.server.children(BACKEND), stage.server.regions()
    expect(len(backends) == 1 and len(regions) == 1, f"left over: {backends}, {regions}")
    return Row(
        f"kill -9 of {what} with {number} requests open",
        f"{errors.total()} got an error, the last {known:.1f} s later, {len(whole)} whole answers, none hangs; "
        f"serving again after {took}; {state}",
        "the open answers",
    )


def nested_json(stage: Stage) -> Row:
    """Triton 2.51 parses JSON by recursion: the launcher gives it a stack that holds a deep body."""
    before = stage.server.err.count("serving again after")
    body = b'{"text_input": ' + b"[" * 2**20
    try:
        status, _ = stage.server.post("generate", body)
        told, lost = f"refused with status {status}", "nothing"
    except OSError:
        told, lost = (
            f"Triton dies of it (2.51, from PyPI); serving again after {stage.restarted(before + 1)}",
            "the open answers",
        )
    status, _ = stage.gateway(b"[" * (2**20 - 1))
    expect(status == 400, f"the gateway says {status}")
    return Row("1 MB of nested JSON", f"{told}; the gateway refuses it with 400; {stage.answers_right()}", lost)


def drained(stage: Stage) -> Row:
    """SIGTERM while streams run: they are finished, what is new is refused."""
    number, server = _streams(stage), stage.start()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(number)]
    streams = [server.stream(**stage.ask(prompt)) for prompt in prompts]
    begun = [stream.next() for stream in streams]
    unfinished = sum("finish_reason" not in piece for piece in begun)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    late, errors = stage.crowd(8).ended()
    expect(not late and errors.total() == 8, "a request was taken after SIGTERM")
    texts = [whole_text([first, *stream]) for first, stream in zip(begun, streams, strict=True)]
    code = server.process.wait(120)
    expect(code == 0, f"exit code {code}")
    expect(not server.regions(), f"left over: {server.regions()}")
    same = stage.same(zip(prompts, texts, strict=True))
    told = f"all {number} finished, {same}; 8 new ones refused; exit code 0, no shared memory left"
    return Row(f"SIGTERM with {unfinished} running streams", told, "nothing")


def launcher_killed(stage: Stage) -> Row:
    """Everything that it started goes too, and the next start cleans up."""
    server = stage.start()
    below = [pid for name in (BACKEND, SERVER) for pid in server.children(name)] + [_gateway(stage)]
    crowd = stage.crowd(_streams(stage))
    crowd.running(1)
    begin = time.monotonic()
    server.kill()
    while any(Path("/proc", str(pid)).exists() for pid in below):
        expect(time.monotonic() - begin < 40, "a process outlives the launcher")
        time.sleep(0.05)
    gone = time.monotonic() - begin
    _, errors = crowd.ended()
    stage.start()
    expect(not server.regions(), f"left over: {server.regions()}")
    told = f"all its processes gone after {gone:.1f} s, {errors.total()} clients got an error, none hangs"
    return Row(
        "kill -9 of `echo-trt serve`", f"{told}; a new start cleans up; {stage.answers_right()}", "the open answers"
    )


def _streams(stage: Stage) -> int:
    return stage.count(STREAMS, 4)
