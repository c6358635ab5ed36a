"""The server without Triton as its processes: an engine, and the gateway that asks it on a socket; and its clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from asking import ask
from engine.service.served import Served
from waiting import wait_until

from echo_trt import LLM, SamplingParams
from echo_trt.engine.process import wire
from echo_trt.files import store
from echo_trt.speculation.pack import BLOCK
from echo_trt.supervision.probe import engine_works


def body(**more: object) -> dict[str, object]:
    return {"model": "echo", "prompt": "the theme", "max_tokens": 12, "ignore_eos": True, "temperature": 0, **more}


def engine_of(server: Served) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(process for process in children if "echo_trt.engine.process" in process.cmdline())


def test_answers_are_the_engine_s_own(server, roomy_bundle):
    llm = LLM(roomy_bundle)
    [expected] = llm.generate([llm.tokenizer.encode("the theme")], SamplingParams(12, ignore_eos=True))
    assert server.complete("the theme", max_tokens=12) == expected.text != ""


def test_the_socket_is_its_user_s_alone_and_takes_probes(server):
    [path] = [Path(word) for word in engine_of(server).cmdline() if word.endswith("/engine")]
    assert path.stat().st_mode & 0o077 == 0
    assert asyncio.run(engine_works(path, 10))
    assert asyncio.run(engine_works(path, 10, patient=True))
    assert not asyncio.run(engine_works(path.with_name("nobody"), 1, patient=True))
    assert isinstance(ask(str(path), wire.Submit(prompt=[10**6], params=SamplingParams()), 10), wire.Failure)
    assert ask(str(path.with_name("nobody")), wire.Scrape(1), 1) is None


TEXTS = ("the theme", "a thing", "what is the name", "so")


@pytest.fixture(scope="module")
def answered(server) -> Callable[[], list[str]]:
    """Ask TEXTS all at once."""

    def get() -> list[str]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda text: server.complete(text, max_tokens=24), TEXTS))

    return get


def test_a_crowd_that_leaves_takes_nothing_from_others(server, answered):
    expected = answered()

    def leave(number: int) -> None:
        sent = body(prompt=TEXTS[number % 4], max_tokens=400, stream=True)
        with httpx.stream("POST", f"http://127.0.0.1:{server.openai}/v1/completions", json=sent, timeout=60) as answer:
            next(answer.iter_lines())

    with ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(leave, number) for number in range(32)]
        assert answered() == expected
        assert [one.result() for one in gone] == [None] * 32
    server.rest()
    assert answered() == expected


def test_clients_that_do_not_read_hold_up_nobody(server, answered):
    """Twice as many as there are places, each with an answer that its connection cannot hold."""
    expected = answered()
    with ExitStack() as stack:
        for number in range(8):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.openai))
            sent = json.dumps(body(prompt=TEXTS[number % 4], max_tokens=400, stream=True)).encode()
            head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
            reader.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + sent)
        assert answered() == expected
    server.rest()


def test_an_engine_that_is_killed_comes_back_and_open_requests_end_with_an_error(server):
    found: list[httpx.Response] = []
    with httpx.Client(base_url=f"http://127.0.0.1:{server.openai}", timeout=60) as client:
        ask = lambda **more: client.post("/v1/completions", json=body(**more))  # noqa: E731
        thread = threading.Thread(target=lambda: found.append(ask(max_tokens=400, n=64)))
        thread.start()
        server.wait_metrics(lambda metrics: metrics["echo_running"] > 0)
        os.kill(engine_of(server).pid, signal.SIGKILL)
        thread.join(30)
        assert found[0].status_code == 503
        wait_until(lambda: ask().status_code == 200)
        assert client.get("/health").status_code == 200
    assert "the engine has died (signal 9, Killed); starting it again" in server.err


def test_it_listens_on_ipv6_and_sigterm_lets_open_answers_finish_and_keeps_them(roomy_bundle, tmp_path):
    options = "--host", "::1", "--store", tmp_path / "store"
    server = Served(roomy_bundle, tmp_path / "log", *options).wait_for("serving")
    url = f"http://[::1]:{server.openai}/v1"
    try:
        assert url in server.err
        with httpx.stream("POST", f"{url}/completions", json=body(max_tokens=400, stream=True), timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.err
        kept = {what: count for _, what, count, _ in store.inspect(tmp_path / "store")}
        assert kept.pop("blocks") >= 400 // BLOCK
        assert len(kept) == 1  # what the policy has learnt
    finally:
        server.kill()


def test_a_server_of_nothing_is_refused(roomy_bundle, tmp_path):
    server = Served(roomy_bundle, tmp_path / "log", "--openai-port", 0)
    assert server.process.wait(60) == 2
    assert "nothing would be served" in server.err


def test_without_a_prefix_cache_every_prompt_is_computed(roomy_bundle, tmp_path):
    server = Served(roomy_bundle, tmp_path / "log", "--no-prefix-cache").wait_for("serving")
    try:
        for _ in range(2):
            url = f"http://127.0.0.1:{server.openai}/v1/completions"
            usage = httpx.post(url, json=body(prompt=[5] * 100), timeout=60).json()["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    finally:
        assert server.stop() == 0


def test_a_policy_of_a_user_s_own_file(roomy_bundle, tmp_path):
    options = "--policy-file", Path(__file__).parents[3] / "examples" / "chain_policy.py", "--policy", "chain"
    server = Served(roomy_bundle, tmp_path / "log", *options).wait_for("serving")
    try:
        plain, drafted = (
            server.complete("the theme", max_tokens=16, speculate=speculate) for speculate in (False, True)
        )
        assert drafted == plain != ""
        metrics = server.wait_metrics(lambda metrics: metrics["echo_drafted_tokens_total"] > 0)
        assert metrics['echo_policy{policy="chain"}'] == 1
    finally:
        assert server.stop() == 0
