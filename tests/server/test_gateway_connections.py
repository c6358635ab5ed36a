"""Clients that connect and say nothing, or half of it, are sent away; they use up no descriptors and fill no log."""

from __future__ import annotations

import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import psutil
import pytest
from server.running import alone, is_up, running
from starlette.applications import Starlette

from echo_trt.server.connections import HttpConnection

MOST, SECONDS = 6, 1.5  # the latter also bounds how long a busy machine may take between two lines of a test
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_A_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    protocol = partial(HttpConnection, limit=MOST, seconds=SECONDS)
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
        for _ in range(3):
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


def test_whether_a_client_that_ended_its_side_has_left_is_looked_at_often(tmp_path):
    """A client that left is noticed by the second look: three take 2 seconds where a look is a second."""
    body = b'{"model": "echo", "prompt": "hello"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as silent, running(tmp_path / "engine") as client:
        silent.bind(str(tmp_path / "engine"))
        silent.listen()  # an engine that does not answer
        with connect(client.base_url.port) as connection:
            connection.sendall(head % len(body) + body)
            connection.shutdown(socket.SHUT_WR)
            begin, received = time.monotonic(), b""
            while received.count(b"100 Continue") < 3:
                received += connection.recv(65536)
            assert time.monotonic() - begin < 1.9


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_application_stops_as_ours_does():
    with running(Starlette()) as client:
        assert client.get("/").status_code == 404


@pytest.fixture(scope="module")
def patient() -> Iterator[int]:
    """Nobody's time runs out."""
    protocol = partial(HttpConnection, limit=MOST, seconds=600)
    with running(server={"http": protocol, "timeout_keep_alive": 600}) as client:
        client.close()
        yield client.base_url.port


def test_beyond_the_limit_who_has_owed_a_request_longest_is_closed(patient, caplog):
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(patient)) for _ in range(MOST)]
        for connection in silent[:2]:
            assert_alone_closed_by_another(connection, stack, patient)
        silent[2].sendall(HALF_A_BODY)  # that is no request yet
        assert_alone_closed_by_another(silent[2], stack, patient)
        for connection in silent[3:]:
            connection.settimeout(0.3)
            assert not is_closed(connection)
    assert "Exception" not in caplog.text


def assert_alone_closed_by_another(connection: socket.socket, stack: ExitStack, port: int) -> None:
    answers(stack.enter_context(connect(port)))
    assert is_closed(connection)


def test_where_nobody_owes_a_request_the_newest_is_closed(patient):
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(patient)) for _ in range(MOST)]
        for connection in crowd:
            answers(connection)
        assert is_closed(stack.enter_context(connect(patient)))
        answers(crowd[0])
    with connect(patient) as connection:
        answers(connection)


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
        assert not [each for each in lines if "/v1/models" not in each and "Invalid HTTP" not in each]
