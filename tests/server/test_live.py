"""The live page's files and its stream of snapshots: keys, crowds, slow readers, ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from server.running import KEY, NOBODY, client_of, refused, running
from waiting import wait_until

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.process.client import Client
from echo_trt.engine.service import SNAPSHOT_FORMAT
from echo_trt.server import live
from echo_trt.server.errors import ApiError
from echo_trt.server.page_files import PageFiles

CHAT = [{"role": "user", "content": "the theme of a thing"}]
LONG = {"model": "echo", "messages": CHAT, "max_tokens": 600, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


def reported(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Events of a stream as they come."""
    kind = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        if line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def test_files_need_no_key_and_what_tells_anything_does(client, server):
    bare = httpx.Client(base_url=client.base_url)
    for path in PageFiles().files:
        response = bare.get(path)
        assert response.status_code == 200
        assert "'unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert KEY not in response.text
        again = bare.get(path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert bare.head(path).status_code == 200
    for path in ("/live", "/live/about"):
        assert "key" in refused(bare.get(path), 401)
        assert "key" in refused(bare.get(path, headers={"authorization": "Bearer sk-another-key-0000"}), 401)
    for path in ("/page/", "/page/nothing.js", "/page/../app.py", "/page/%2e%2e/app.py", "/live/"):
        refused(client.get(path), 404)
    assert refused(bare.post("/"), 405)
    assert client.head("/live").status_code == 200


def test_snapshots_come_while_an_answer_is_made(client):
    with ThreadPoolExecutor() as pool, client.stream("GET", "/live") as stream:
        events = reported(stream)
        kind, hello = next(events)
        assert (kind, hello["format"], hello["build"]) == ("hello", SNAPSHOT_FORMAT, PageFiles().build)
        _, before = next(events)
        answer = pool.submit(client.post, "/v1/chat/completions", json=LONG)
        seen, begin = [before], time.monotonic()
        for kind, now in events:
            assert kind == "snapshot"
            seen.append(now)
            if answer.done() and not now["running"]:
                break
        seconds = time.monotonic() - begin
    assert answer.result().status_code == 200
    assert len(seen) <= 10 * seconds + 2
    emitted = [now["totals"]["emitted_tokens"] for now in seen]
    assert emitted == sorted(emitted)
    assert emitted[-1] - emitted[0] == LONG["max_tokens"]
    trees = [now["last"] for now in seen if now["last"]]
    assert len({tree["time"] for tree in trees}) > 1
    assert max(len(each["parent"]) for tree in trees for each in tree["requests"]) > 3


def test_a_viewer_is_no_running_request(client):
    with client.stream("GET", "/live") as viewer:
        assert next(reported(viewer))[0] == "hello"
        wait_until(lambda: running_is(client, 0))  # one that was answered a moment ago may count still
        with client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True, "n": 64}) as answer:
            lines = answer.iter_lines()  # an iterator that is gone closes the response
            next(lines)  # of 38,400 tokens, which the end of this block cancels
            wait_until(lambda: running_is(client, 1))
        wait_until(lambda: running_is(client, 0))


def running_is(client: httpx.Client, number: int) -> bool:
    return f"echo_gateway_running {number:.1f}" in client.get("/metrics").text.splitlines()


def test_200_viewers_share_one_watch_and_no_answer_changes(server, client, long_bundle):
    offline = LLM(long_bundle, "autoregressive", 1)
    expected = offline.chat(CHAT, SamplingParams(LONG["max_tokens"], ignore_eos=True))[0].text
    with ExitStack() as stack:
        viewers = [stack.enter_context(client_of(server).stream("GET", "/live")) for _ in range(200)]
        readers = [reported(viewer) for viewer in viewers[:20]]  # the others do not read
        assert {next(reader)[0] for reader in readers} == {"hello"}
        answer = client.post("/v1/chat/completions", json=LONG).json()
        assert answer["choices"][0]["message"]["content"] == expected
        for reader in readers:
            assert next(reader)[0] == "snapshot"
        assert client.get("/health").status_code == 200


# -- in this process, with smaller bounds ------------------------------------------------------------------------------


def test_too_many_viewers_are_refused(server, monkeypatch):
    monkeypatch.setattr(live, "MAX_VIEWERS", 2)
    with running(engine=server.engine) as client, ExitStack() as stack:
        readers = [reported(stack.enter_context(client.stream("GET", "/live"))) for _ in range(2)]
        assert [next(reader)[0] for reader in readers] == ["hello", "hello"]
        response = client.get("/live")
        assert "2 viewers" in refused(response, 503)
        assert response.headers["retry-after"] == "30"


def test_a_viewer_that_does_not_read_makes_room_for_another(monkeypatch):
    monkeypatch.setattr(live, "MAX_VIEWERS", 2)
    monkeypatch.setattr(live, "STUCK_S", 0.2)

    async def run() -> None:
        looked_at = live.Live(Client(NOBODY))
        reader, stuck = looked_at.events("hello"), looked_at.events("hello")
        assert [await anext(reader), await anext(stuck)] == ["hello", "hello"]
        with pytest.raises(ApiError, match="2 viewers"):
            await anext(looked_at.events("hello"))
        for _ in range(3):
            assert (await anext(reader)).startswith("event: away")
        another = looked_at.events("hello")
        assert await anext(another) == "hello"
        assert (await anext(another)).startswith("event: away")
        with pytest.raises(StopAsyncIteration):
            await anext(stuck)
        looked_at.leave()
        for events in (reader, another):
            assert len([event async for event in events]) <= 1
        with pytest.raises(ApiError):
            await anext(looked_at.events("hello"))
        await looked_at.close()

    asyncio.run(run())


def test_the_engine_stops_looking_when_the_last_viewer_leaves(server):
    """The engine takes a limited number of onlookers, and closed ones free their places."""
    with running(engine=server.engine) as client:
        for _ in range(9):
            with client.stream("GET", "/live") as stream:
                events = reported(stream)
                assert [next(events)[0] for _ in range(2)] == ["hello", "snapshot"]


def test_sigterm_sends_viewers_away_and_ends_in_good_order(process):
    with client_of(process) as client, client.stream("GET", "/live") as stream:
        events = reported(stream)
        assert [next(events)[0] for _ in range(2)] == ["hello", "snapshot"]
        begin = time.monotonic()
        process.process.terminate()
        for _ in events:
            pass
        assert process.process.wait(60) == 0
        assert time.monotonic() - begin < 40
