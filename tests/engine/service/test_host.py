"""An engine's host in this process: messages on a socket, one faulty answer among others, clients that leave."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import ask
from waiting import PATIENCE, listens, wait_until

from echo_trt import LLM
from echo_trt.engine.process import host, wire
from echo_trt.engine.process.client import Client, EngineError
from echo_trt.engine.process.host import Host
from echo_trt.engine.process.request import Reader
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.engine.service.service import Service


@pytest.fixture(scope="module")
def service(bundle_of) -> Iterator[Service]:
    service = Service(LLM(bundle_of("close")))
    yield service
    service.close(0)


@pytest.fixture(scope="module")
def path(service, bundle_of, tmp_path_factory) -> Iterator[str]:
    path, stop, loop = tmp_path_factory.mktemp("host") / "engine", asyncio.Event(), asyncio.new_event_loop()
    reader = Reader(bundle_of("close"), service.loop.batch.context)
    served: list[bool] = []

    def run() -> None:
        served.append(loop.run_until_complete(Host(service, reader, EngineMetrics("echo")).serve(path, stop)))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: listens(path))
    yield str(path)
    loop.call_soon_threadsafe(stop.set)
    thread.join(PATIENCE)
    assert served == [True]


def test_an_engine_whose_connection_has_ended_is_not_well_though_text_has_just_come(tmp_path):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await wire.read_request(reader)
        writer.write(wire.framed(wire.TextPiece(question.id, "x", finish_reason="stop")))
        await asyncio.sleep(0.1)
        writer.close()

    async def check() -> None:
        engine = await asyncio.start_unix_server(answer, tmp_path / "engine")
        client = Client(tmp_path / "engine")
        async for _ in client.submit({}):
            await client.check()
        engine.close()
        (tmp_path / "engine").unlink(missing_ok=True)  # a later Python has removed it
        while not client._writer.is_closing():
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError):
            await client.check()

    asyncio.run(check())


def test_any_number_of_scrapes_cost_as_much_as_one(path, monkeypatch):
    monkeypatch.setattr(host, "FLUSH", 3600)
    made = []
    written = host.generate_latest
    monkeypatch.setattr(host, "generate_latest", lambda registry: made.append(1) or written(registry))
    assert all(isinstance(ask(path, wire.Scrape(number), 30), wire.TextReply) for number in range(9))
    assert len(made) <= 1  # none where a test has just asked


def request(**more: object) -> dict[str, object]:
    return {"text_input": "the theme", "max_tokens": 8, "ignore_eos": True, **more}


def test_questions_are_answered(path):
    answer = ask(path, wire.Submit(3, request(return_perf_metrics=True)))
    assert isinstance(answer, wire.TextPiece)
    assert (answer.id, len(answer.token_ids), answer.finish_reason) == (3, 8, "length")
    assert (answer.completion_tokens, answer.prompt_tokens > 0) == (8, True)
    assert ask(path, wire.Describe(1)).context > 0
    tokens = ask(path, wire.Tokenize(1, {"text_input": "the theme"}))
    assert ask(path, wire.Tokenize(1, {"input_ids": tokens.token_ids})).text == "the theme"
    assert "echo_iterations_total" in ask(path, wire.Scrape(1)).text


@pytest.mark.parametrize(
    ("inputs", "code", "word"),
    [
        ({}, "INVALID_ARGUMENT", "no prompt"),
        (request(input_ids=[5]), "INVALID_ARGUMENT", "input_ids and text_input given"),
        ({"input_ids": [5, 999]}, "INVALID_ARGUMENT", "token id 999"),
        (request(text_input=""), "INVALID_ARGUMENT", "empty"),
        (request(text_input="word " * 2000), "OUT_OF_RANGE", "shorten it"),
        (request(temperature=-1.0), "INVALID_ARGUMENT", "temperature is -1.0"),
        (request(structured='{"regex": "("}'), "INVALID_ARGUMENT", "structured.regex"),
        (request(max_tokens=0), "INVALID_ARGUMENT", "max_tokens is 0"),
        (request(max_tokens=-1, min_length=2), "INVALID_ARGUMENT", "max_tokens is -1"),
        (request(min_length=300), "INVALID_ARGUMENT", "min_length is 300"),
        (request(deadline_ms=-4), "INVALID_ARGUMENT", "deadline_ms is -4"),
        (request(logit_bias_ids=[5, 6], logit_bias=[1.5]), "INVALID_ARGUMENT", "logit_bias_ids has 2 values"),
        (request(logit_bias_ids=[999], logit_bias=[1.5]), "INVALID_ARGUMENT", "token id 999"),
        (request(top_logprobs=5), "INVALID_ARGUMENT", "return_log_probs is not true"),
        (request(return_log_probs=True, top_logprobs=21), "INVALID_ARGUMENT", "top_logprobs is 21"),
        (request(stop_words=["x"] * 65), "INVALID_ARGUMENT", "stop_words has 65"),
        (request(stop_words=7), "INTERNAL", "could not be read"),
        ({"chat_messages": "{"}, "INVALID_ARGUMENT", "not JSON"),
        ({"chat_messages": "[]"}, "INVALID_ARGUMENT", "no list of messages"),
        ({"chat_messages": '[{"role": "user"}]'}, "INVALID_ARGUMENT", "chat_messages[0]"),
    ],
)
def test_a_request_that_cannot_be_taken_is_a_failure(inputs, code, word, path):
    failure = ask(path, wire.Submit(1, inputs))
    assert (failure.code, word in failure.message) == (code, True), failure


def test_an_answer_that_cannot_be_sent_fails_alone(path, monkeypatch):
    real = host.OpenRequest.piece

    def piece(self, event):
        if self.question == 13:
            raise RuntimeError("a faulty part")
        return real(self, event)

    monkeypatch.setattr(host.OpenRequest, "piece", piece)
    found: dict[int, wire.FromEngine | None] = {}

    def send(id: int) -> None:
        found[id] = ask(path, wire.Submit(id, request(max_tokens=30)))

    threads = [threading.Thread(target=send, args=(id,)) for id in (12, 13, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert isinstance(found[13], wire.Failure)
    assert found[13].code == "INTERNAL"
    assert [len(found[id].token_ids) for id in (12, 14)] == [30, 30]


def test_few_clients_get_snapshots_and_a_cancelled_one_leaves_room(path):
    clients = [socket.socket(socket.AF_UNIX) for _ in range(host.MAX_VIEWERS)]
    for client in clients:
        client.connect(path)
        client.sendall(wire.framed(wire.WatchSnapshots(1)))
        assert client.recv(1)  # of a snapshot
    refused = ask(path, wire.WatchSnapshots(1))
    assert (refused.code, "clients get snapshots" in refused.message) == ("UNAVAILABLE", True)
    clients[0].sendall(wire.framed(wire.Cancel(1)))
    wait_until(lambda: isinstance(ask(path, wire.WatchSnapshots(1)), wire.TextReply))
    for client in clients:
        client.close()


def test_nothing_is_answered_for_a_client_that_has_left(path, service, monkeypatch):
    step, opened, before = service.loop.step, threading.Event(), service.statistics().ended.get("cancelled", 0)
    monkeypatch.setattr(service.loop, "step", lambda: (opened.wait(30), step())[1])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(wire.framed(wire.Submit(1, request(max_tokens=100))))
        wait_until(lambda: service.statistics().running + service.statistics().queued)
    for _ in range(3):  # the host has seen it leave before
        ask(path, wire.Describe(1), 30)
    opened.set()
    wait_until(lambda: service.statistics().ended.get("cancelled", 0) == before + 1, 60)


def test_answers_that_end_together_are_no_silence(tmp_path, monkeypatch):
    """The door's one connection holds all its clients' answers, and may have far more to read than one message."""
    monkeypatch.setattr(wire, "LARGEST", 2**16)
    number, connections = 100, []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(host.ClientConnection(writer))
        while await wire.read_request(reader):
            pass

    async def ended(client: Client) -> int:
        return sum([len(piece.logprobs) async for piece in client.submit({})])

    async def run() -> list[int]:
        server = await asyncio.start_unix_server(connected, tmp_path / "engine")
        client = Client(tmp_path / "engine")
        answers = [asyncio.create_task(ended(client)) for _ in range(number)]
        while not connections:
            await asyncio.sleep(0.01)
        for id in range(1, number + 1):
            connections[0].send(wire.TextPiece(id, logprobs="y" * 50_000, finish_reason="length"))
        assert connections[0].writer.transport.get_write_buffer_size() > wire.LARGEST
        connections[0].check(1e9)
        found = await asyncio.gather(*answers)
        await client.close()
        server.close()
        return found

    assert asyncio.run(run()) == [50_000] * number


def is_cut_off(client: socket.socket) -> bool:
    try:
        client.sendall(wire.framed(wire.Cancel(1)))
    except OSError:
        return True
    return False


def test_a_client_that_reads_nothing_is_cut_off(path, monkeypatch):
    monkeypatch.setattr(wire, "LARGEST", 2**16)
    monkeypatch.setattr(host, "SILENT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        for number in range(200):
            client.sendall(wire.framed(wire.Scrape(number)))
        wait_until(lambda: is_cut_off(client))
    assert isinstance(ask(path, wire.Submit(1, request()), 30), wire.TextPiece)


def test_an_answer_that_is_too_large_to_be_read_fails_alone(path, monkeypatch):
    answer = wire.Submit(1, request(return_log_probs=True, top_logprobs=20, max_tokens=60))
    monkeypatch.setattr(wire, "LARGEST", 2**14)
    failure = ask(path, answer, 30)
    assert isinstance(failure, wire.Failure)
    assert "too large to be sent" in failure.message


def test_what_is_no_message_ends_its_connection_alone(path):
    for sent in (b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff", Path(__file__).read_bytes()[:40]):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    assert isinstance(ask(path, wire.Submit(1, request())), wire.TextPiece)
