"""Clients that connect and say nothing, or half of it, are sent away; they use up no descriptors and fill no log."""

from __future__ import annotations

import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import httpx
import psutil
import pytest
from server.running import COMPLETION, KEY, Door, alone, engine_of, is_up, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from waiting import wait_until

from echo_trt.server.connections import ConnectionSlots, HttpConnection

MOST, SECONDS = 6, 1.5  # the latter also bounds how long a busy machine may take between two lines of a test
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_A_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    protocol = partial(HttpConnection, slots=ConnectionSlots(MOST), arrival=SECONDS)
    with running(server={"http": protocol, "timeout_keep_alive": 4}) as client:
        yield client.base_url.port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def is_closed(connection: socket.socket) -> bool:
    """Read to the end, which may be a reset."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def answers(connection: socket.socket) -> None:
    """Check that a request on the connection is answered to the end."""
    connection.sendall(MODELS)
    received = b""
    while not received.endswith(b"}]}"):
        part = connection.recv(65536)
        assert part, received
        received += part
    assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("output", [b"", b"GET /v1/mod", MODELS[:-2], HALF_A_BODY, MODELS + b"GET /v1"])
def test_a_request_that_does_not_come_ends_the_connection(port, output):
    begin = time.monotonic()  # before the server sees the connection, whose time runs from there
    with connect(port) as connection:
        connection.sendall(output)
        assert is_closed(connection)
    assert time.monotonic() - begin > SECONDS - 0.1


def test_a_byte_now_and_then_gives_no_more_time(port):
    with connect(port) as connection, pytest.raises(ConnectionError):  # noqa: PT012
        for byte in MODELS * 10:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)


def test_a_request_that_came_has_all_the_time_and_so_has_the_next(port):
    with connect(port) as connection:
        for _ in range(2):
            answers(connection)
            time.sleep(SECONDS + 0.3)


def test_a_client_that_ends_its_side_after_a_request_is_answered(port):
    body = b'{"model": "echo", "prompt": "hello"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(head % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    final = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")  # sent where the end was read before the answer
    assert final.startswith(b"HTTP/1.1 503")
    assert final.endswith(b"}}")


@pytest.fixture(scope="module")
def patient() -> Iterator[int]:
    """Nobody's time runs out."""
    protocol = partial(HttpConnection, slots=ConnectionSlots(MOST), arrival=600)
    with running(server={"http": protocol, "timeout_keep_alive": 600}) as client:
        client.close()
        yield client.base_url.port


def test_at_the_limit_idle_connections_are_closed_first_and_of_them_the_least_recently_used(patient):
    with ExitStack() as stack:
        silent, *idle = [stack.enter_context(connect(patient)) for _ in range(MOST)]
        for connection in (*idle, idle[0]):
            answers(connection)
        for connection in (*idle[1:], idle[0]):
            answers(stack.enter_context(connect(patient)))
            assert is_closed(connection)
        silent.sendall(MODELS.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert silent.recv(100).startswith(b"HTTP/1.1 200")


def test_where_none_is_idle_who_has_owed_a_request_longest_is_refused(patient, caplog):
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(patient)) for _ in range(MOST)]
        silent[1].sendall(HALF_A_BODY)  # that is no request yet
        for connection in silent[:2]:
            crowd = stack.enter_context(connect(patient))
            crowd.sendall(MODELS[:-2])
            received = connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1\r\n" in received
            assert received.endswith(b"}}")
            assert is_closed(connection)
        crowd.sendall(MODELS[-2:])
        assert crowd.recv(100).startswith(b"HTTP/1.1 200")
        for connection in silent[2:]:
            connection.settimeout(0.3)
            assert not is_closed(connection)
    assert "Exception" not in caplog.text


LARGE = b"x" * 2**24  # more than the system keeps of an answer that nobody reads


async def large(request: Request) -> Response:
    return Response(LARGE)


@contextmanager
def unread(most: int, seconds: float) -> Iterator[int]:
    protocol = partial(HttpConnection, slots=ConnectionSlots(most), unread=seconds)
    app = Starlette(routes=[Route("/large", large), Route("/v1/models", lambda _: Response("]}]}"))])
    with running(app, server={"http": protocol, "timeout_keep_alive": 600}) as client:
        yield client.base_url.port


def ask_for_much(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.recv(10) == b"HTTP/1.1 2"
    return connection


def read_to_the_end(connection: socket.socket, slow: float = 0) -> int:
    """Return the number of bytes that come before the end, which may be a reset; ``slow``: seconds without haste."""
    number, begin = 0, time.monotonic()
    with suppress(ConnectionError):
        while number < len(LARGE) and (part := connection.recv(2**18)):
            number += len(part)
            time.sleep(0.1 if time.monotonic() - begin < slow else 0)
    return number


def test_an_answer_of_which_nothing_is_taken_ends_its_connection():
    with unread(MOST, 0.5) as port, ask_for_much(port) as connection:
        time.sleep(3)
        assert read_to_the_end(connection) < len(LARGE) / 2  # what the system held


def test_a_slow_reader_gets_its_answer_whole():
    with unread(MOST, 2) as port, ask_for_much(port) as connection:
        assert read_to_the_end(connection, slow=5) >= len(LARGE)


def test_at_the_limit_unread_answers_end_before_a_new_client_is_refused():
    with unread(MOST, 600) as port, ExitStack() as stack:
        crowd = [stack.enter_context(ask_for_much(port)) for _ in range(MOST)]
        for _ in crowd:
            answers(stack.enter_context(connect(port)))


@pytest.fixture
def busy(tmp_path, keys) -> Iterator[tuple[int, Callable[[], None], ExitStack]]:
    """Return the port of a door of which all places but the kept one are taken by answers that are long in coming, and
    what takes that one.
    """
    body = b'{"model": "echo", "prompt": "hello"}'
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"

    def take_one() -> None:
        taken, connection = len(slots._since["answered"]), stack.enter_context(connect(port))
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
        wait_until(lambda: len(slots._since["answered"]) > taken)

    slots = ConnectionSlots(MOST)
    server = {"http": partial(HttpConnection, slots=slots)}
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket(socket.AF_UNIX))
        silent.bind(str(tmp_path / "engine"))
        silent.listen()  # an engine that does not answer
        port = stack.enter_context(running(tmp_path / "engine", server=server, api_keys_file=keys)).base_url.port
        for _ in range(MOST - 1):
            take_one()
        yield port, take_one, stack


def reply(port: int, stack: ExitStack, path: str, key: str) -> bytes:
    connection = stack.enter_context(connect(port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {key}\r\n\r\n".encode())
    return connection.recv(65536)


def test_a_door_that_is_full_answers_503_and_keeps_a_place_for_keys_and_probes(busy):
    port, _, stack = busy
    refusal = reply(port, stack, "/openapi.json", "a-wrong-key-0123456789")
    assert refusal.startswith(b"HTTP/1.1 401")  # a key that is wrong is not told that it should come again
    assert reply(port, stack, "/", "").startswith(b"HTTP/1.1 503")
    assert reply(port, stack, "/version", "").startswith(b"HTTP/1.1 200")
    assert reply(port, stack, "/v1/models/none", KEY).startswith(b"HTTP/1.1 404")


def test_who_comes_when_all_are_answered_is_told_to_come_again(busy):
    port, take_one, stack = busy
    take_one()
    for _ in range(3):
        connection = stack.enter_context(connect(port))
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"retry-after: 1\r\n" in received
        assert b'"All connections of this server are in use; retry in a second."' in received
        assert is_closed(connection)


def test_the_process_survives_more_connections_than_descriptors_and_says_no_more(tmp_path):
    def begin() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background

    with (tmp_path / "log").open("wb") as log, alone(stdout=log, stderr=log, preexec_fn=begin) as (client, process):
        port = client.base_url.port
        with ExitStack() as stack:
            crowd = [stack.enter_context(connect(port)) for _ in range(300)]
            time.sleep(1)
            assert is_up(client)
            for connection in crowd[-10:]:
                connection.sendall(b"nonsense\r\n\r\n")
            assert crowd[-1].recv(100).startswith(b"HTTP/1.1 400")
            assert is_closed(crowd[0])
        time.sleep(0.5)
        assert is_up(client)
        assert process.rlimit(psutil.RLIMIT_NOFILE) == (128, 128)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        lines = (tmp_path / "log").read_text().splitlines()
        expected = ("/v1/models", "Invalid HTTP", "All connections of this server are in use")
        assert not [each for each in lines if not any(known in each for known in expected)]


def test_answers_that_the_end_of_the_server_cuts_end_with_a_sentence(long_bundle, caplog):
    """The time for answers in flight is over at once: a stream gets a last event, another answer a status."""
    body = COMPLETION | {"max_tokens": 1400, "ignore_eos": True}
    with engine_of(long_bundle) as engine, ThreadPoolExecutor() as pool:
        door = Door(engine, server={"timeout_graceful_shutdown": 0})
        url = f"http://127.0.0.1:{door.openai}/v1/completions"
        whole = pool.submit(httpx.post, url, json=body, timeout=60)
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            wait_until(lambda: len(door._server.server_state.tasks) == 2)
            door.kill()
            last = [line for line in lines if line][-1]
        answer = whole.result()
    assert "The server stopped before this answer was finished" in last
    assert answer.status_code == 503
    assert "The server stopped before this answer was finished" in answer.text
    assert "Traceback" not in caplog.text
