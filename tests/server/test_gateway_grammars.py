"""Slow grammars of one client over HTTP: what other clients notice, and what their senders."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from engine.service.served import Served
from server.running import client_of, post, refused

CHAT = "/v1/chat/completions"
ASKED = {"model": "echo", "messages": [{"role": "user", "content": "the theme"}], "max_tokens": 2}
ANY_OBJECT = {**ASKED, "response_format": {"type": "json_object"}}


def slow(number: int, divisor: int = 99991, **more: Any) -> dict[str, Any]:
    """Return a request under a schema of its own, which takes a second to compile; less with a smaller divisor."""
    schema = {"type": "array", "items": {"type": "number", "multipleOf": divisor - 2 * number}}
    form = {"type": "json_schema", "json_schema": {"name": "slow", "schema": schema}}
    return {**ASKED, "response_format": form, **more}


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


def outcomes(server: Served, outcome: str) -> float:
    return server.metrics().get(f'echo_requests_total{{outcome="{outcome}"}}', 0)


def wait_for_outcomes(server: Served, outcome: str, number: float) -> None:
    server.wait_metrics(lambda found: found.get(f'echo_requests_total{{outcome="{outcome}"}}', 0) >= number)


def answered(connections: list[socket.socket]) -> int:
    """How many of these requests have something to read by now."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        with suppress(BlockingIOError):
            count += bool(connection.recv(1, socket.MSG_PEEK))
    return count


def test_another_client_s_object_waits_for_no_slow_grammar(client, server):
    """Neither do plain requests. Of 20 grammars, whose clients stay, few are compiled by then."""
    assert client.post(CHAT, json=slow(0, 9991)).status_code == 200  # the first grammar of all reads the tokenizer
    hostile = [post(server, CHAT, slow(i)) for i in range(20)]
    server.wait_metrics(lambda found: found["echo_queued"] >= 15)
    for body in (ANY_OBJECT, ASKED):
        assert client.post(CHAT, json=body).status_code == 200
    assert answered(hostile) < 10
    left = outcomes(server, "cancelled")
    for connection in hostile:
        connection.close()
    wait_for_outcomes(server, "cancelled", left + 10)
    assert client.post(CHAT, json=slow(1, 9991)).status_code == 200  # and nothing of theirs is before it
    server.wait_metrics(lambda found: found["echo_queued"] == 0)


def test_the_deadline_counts_while_grammars_are_compiled(client, server):
    hostile = [post(server, CHAT, slow(i, 99891)) for i in range(8)]
    server.wait_metrics(lambda found: found["echo_queued"] >= 6)
    assert "deadline" in refused(client.post(CHAT, json=slow(0, 9891, deadline_ms=100)), 504)
    assert answered(hostile) < 6
    for connection in hostile:
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_becomes_too_complex_is_its_client_s_mistake(client, server, stream):
    """It is no failure of the engine's, which would wake an operator. A stream that fails is no success, either."""
    counted = 'echo_gateway_requests_total{path="/v1/chat/completions",status="%d"}'
    before = server.metrics()
    invalid, failed = outcomes(server, "invalid"), outcomes(server, "failed")
    costly = {"grammar": 'start: (("ab"{1,1000}){1,1000}){900,1000}'}
    answer = client.post(CHAT, json={**ASKED, "structured_outputs": costly, "max_tokens": 900, "stream": stream})
    if stream and answer.status_code == 200:
        assert "structured_outputs.grammar cannot go on here" in answer.text
    else:
        assert "simplify it" in refused(answer, 400, "structured_outputs.grammar")
    after = server.wait_metrics(lambda found: found.get(counted % 400, 0) > before.get(counted % 400, 0))
    assert after.get(counted % 400, 0) == before.get(counted % 400, 0) + 1
    assert after.get(counted % 200, 0) == before.get(counted % 200, 0)
    wait_for_outcomes(server, "invalid", invalid + 1)
    assert outcomes(server, "failed") == failed


def test_a_request_that_waits_for_its_grammar_is_answered_before_the_server_stops(process):
    """The last test of this file: it ends the file's server."""
    with ThreadPoolExecutor(2) as pool, client_of(process) as client:
        requested = [pool.submit(client.post, CHAT, json=slow(i, 99791)) for i in range(2)]
        process.wait_metrics(lambda found: found["echo_queued"] >= 2)
        process.process.terminate()
        for answer in requested:  # on a busy machine some grammar takes too long, which is an answer, too
            status, text = answer.result().status_code, answer.result().text
            assert status == 200 or (status == 400 and "s to compile; make it smaller." in text), text
            json.loads(text)
    assert process.process.wait(60) == 0
