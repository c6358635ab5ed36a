"""The server without Triton: an engine's process, and the gateway that asks it on a socket."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from engine.service.served import Served
from pairs import LIMITS, recipe_of

from echo_trt import LLM, SamplingParams
from echo_trt.cli.build import build
from echo_trt.engine.process import wire
from echo_trt.supervision.probe import EngineProbe


@pytest.fixture(scope="module")
def bundle(networks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "close"
    build(recipe_of("close", networks, limits={**LIMITS, "batch": 4, "context": 1600}), networks, folder)
    return folder


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory) -> Iterator[Served]:
    served = Served(bundle, tmp_path_factory.mktemp("served") / "log")
    try:
        yield served.wait_for("serving")
    finally:
        served.kill()


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.openai}", timeout=60) as client:
        yield client


def body(prompt: str = "the theme", **more: object) -> dict[str, object]:
    return {"model": "echo", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0, **more}


def metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in lines)


def wait_until(fits, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_answers_are_the_engine_s_own_whole_and_streamed(client, bundle):
    llm = LLM(bundle)
    ids = llm.tokenizer("the theme")["input_ids"]
    [expected] = llm.generate([ids], SamplingParams(12, ignore_eos=True))
    whole = client.post("/v1/completions", json=body()).json()
    assert whole["choices"][0]["text"] == expected.text != ""
    assert whole["usage"]["completion_tokens"] == 12
    with client.stream("POST", "/v1/completions", json=body(stream=True)) as streamed:
        lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == expected.text


def test_logprobs_choices_and_refusals_are_told(client):
    reported = client.post("/v1/completions", json=body(logprobs=2, echo=True, n=2)).json()
    for choice in reported["choices"]:
        assert choice["text"].startswith("".join(choice["logprobs"]["tokens"][:-12]))
        assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])
        assert len(choice["logprobs"]["top_logprobs"][-1]) >= 2
    refused = client.post("/v1/completions", json=body(prompt="a " * 4000))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    grammar = client.post("/v1/completions", json=body(structured_outputs={"regex": "("}))
    assert grammar.status_code == 400
    late = client.post("/v1/completions", json=body(max_tokens=1000, deadline_ms=1))
    assert late.status_code in (200, 504)


def test_tokens_health_metrics_and_the_live_page_are_served(client):
    ids = client.post("/tokenize", json={"prompt": "the theme"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "the theme"
    assert client.get("/health").status_code == 200
    assert metric(client, "echo_emitted_tokens_total") > 0
    assert metric(client, "echo_gateway_engine_metrics_up") == 1
    with client.stream("GET", "/live") as live:
        events = (line for line in live.iter_lines() if line.startswith("event:"))
        assert [next(events), next(events)] == ["event: hello", "event: snapshot"]


def test_a_client_that_leaves_frees_its_place_at_once(client):
    with client.stream("POST", "/v1/completions", json=body(max_tokens=1500, stream=True)) as stream:
        lines = stream.iter_lines()
        next(lines)
        wait_until(lambda: metric(client, "echo_running") == 1)
    begin = time.monotonic()
    wait_until(lambda: 'outcome="cancelled"} 1.0' in client.get("/metrics").text)
    assert time.monotonic() - begin < 2
    assert metric(client, "echo_running") == 0


def test_the_socket_is_its_user_s_alone_and_takes_probes(server):
    [engine] = [Path(word) for word in _commands(server) if word.endswith("/engine")][:1]
    assert engine.stat().st_mode & 0o077 == 0
    probe = EngineProbe(engine)
    assert probe.answers(10)
    assert probe.progresses()
    assert isinstance(wire.ask(str(engine), wire.Submit(1, {"input_ids": [10**6]}), 10), wire.Failure)
    assert wire.ask(str(engine.with_name("nobody")), wire.Scrape(1), 1) is None


def _commands(server: Served) -> list[str]:
    words: list[str] = []
    for pid in server.children("python"):
        words += Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return words


def test_an_engine_that_is_killed_comes_back_and_open_requests_end_with_an_error(client, server):
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=body(max_tokens=1500))))
    thread.start()
    wait_until(lambda: metric(client, "echo_running") == 1)
    [engine] = [pid for pid in server.children("python") if b"echo_trt.engine.process" in _command(pid)]
    os.kill(engine, signal.SIGKILL)
    thread.join(30)
    assert found[0].status_code == 503
    wait_until(lambda: client.post("/v1/completions", json=body()).status_code == 200, 60)
    assert client.get("/health").status_code == 200
    assert "the engine has died; starting it again" in server.err


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_sigterm_lets_open_answers_finish(bundle, tmp_path):
    server = Served(bundle, tmp_path / "log").wait_for("serving")
    url = f"http://127.0.0.1:{server.openai}/v1/completions"
    with httpx.stream("POST", url, json=body(max_tokens=400, stream=True), timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--http-port", 8000), "--http-port is a port of Triton's, which is not started; add --triton"),
        (("--openai-port", 0), "nothing would be served"),
    ],
)
def test_options_of_triton_are_refused_without_it(options, sentence, bundle, tmp_path):
    server = Served(bundle, tmp_path / "log", *options)
    assert server.process.wait(60) == 2
    assert sentence in server.err


def test_it_listens_on_ipv6(bundle, tmp_path):
    server = Served(bundle, tmp_path / "log", "--host", "::1").wait_for("serving")
    try:
        answer = httpx.post(f"http://[::1]:{server.openai}/v1/completions", json=body(), timeout=60)
        assert answer.status_code == 200
        assert f"http://[::1]:{server.openai}/v1" in server.err
    finally:
        assert server.stop() == 0
