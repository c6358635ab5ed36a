"""Clients that leave in crowds, and clients that do not read: others get their texts, and no place is lost."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from served import Served

TEXTS = ("the theme", "a thing", "what is the name", "so")


@pytest.fixture(scope="module")
def expected(server) -> list[str]:
    return [text_of(server, text) for text in TEXTS]


def body(prompt: str, **more: object) -> dict[str, object]:
    return {"model": "close", "prompt": prompt, "max_tokens": 24, "ignore_eos": True, "temperature": 0, **more}


def url(server: Served) -> str:
    return f"http://127.0.0.1:{server.openai}/v1/completions"


def text_of(server: Served, prompt: str) -> str:
    return httpx.post(url(server), json=body(prompt), timeout=60).raise_for_status().json()["choices"][0]["text"]


def at_rest(server: Served) -> None:
    """Wait until no request runs or waits, and none holds KV blocks."""
    end = time.monotonic() + 30
    names = ("echo_running", "echo_queued", "echo_blocks_used")
    while any((metrics := server.metrics())[name] for name in names):
        assert time.monotonic() < end, {name: metrics[name] for name in names}
        time.sleep(0.05)


def test_a_crowd_that_leaves_takes_nothing_from_others(server, expected):
    def leave(number: int) -> None:
        requested = body(TEXTS[number % 4], max_tokens=400, stream=True)
        with httpx.stream("POST", url(server), json=requested, timeout=60) as answer:
            next(answer.iter_lines())

    with ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(leave, number) for number in range(32)]
        others = [pool.submit(text_of, server, text) for text in TEXTS]
        assert [other.result() for other in others] == expected
        assert [one.result() for one in gone] == [None] * 32
    at_rest(server)
    assert [text_of(server, text) for text in TEXTS] == expected


def test_clients_that_do_not_read_hold_up_nobody(server, expected):
    """Twice as many as there are places, each with an answer that its connection cannot hold."""
    readers = []
    for number in range(8):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(("127.0.0.1", server.openai))
        requested = httpx.Request("POST", url(server), json=body(TEXTS[number % 4], max_tokens=400, stream=True))
        head = "".join(f"{name}: {value}\r\n" for name, value in requested.headers.items())
        reader.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + requested.read())
        readers.append(reader)
    try:
        assert [text_of(server, text) for text in TEXTS] == expected
    finally:
        for reader in readers:
            reader.close()
    at_rest(server)
