"""An engine's host in this process: messages on a socket, one faulty answer among others, clients that leave."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from asking import ask
from msgspec import msgpack
from waiting import PATIENCE, listens, wait_until

from echo_trt import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.process import host, wire
from echo_trt.engine.process.client import Client, EngineError
from echo_trt.engine.process.host import Host
from echo_trt.engine.request import Event
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
    serve = Host(service, bundle_of("close"), EngineMetrics("echo")).serve
    served: list[bool] = []

    def run() -> None:
        served.append(loop.run_until_complete(serve(path, stop)))

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
        writer.write(wire.framed(Event(id=question.id, token_ids=[5], reason="stop")))
        await asyncio.sleep(0.1)
        writer.close()

    async def check() -> None:
        engine = await asyncio.start_unix_server(answer, tmp_path / "engine")
        client = Client(tmp_path / "engine")
        async for _ in client.submit(request()):
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
    assert all(isinstance(ask(path, wire.Scrape(number), 30), wire.MetricsText) for number in range(9))
    assert len(made) <= 1  # none where a test has just asked


THEME = (116, 104, 101, 32, 116)


def request(id: int = 1, prompt: Sequence[int] = THEME, **params: object) -> wire.Submit:
    return wire.Submit(id, prompt=[*prompt], params=SamplingParams(**{"max_tokens": 8, "ignore_eos": True} | params))


def test_questions_are_answered(path):
    answer = ask(path, request(3))
    assert isinstance(answer, Event)
    assert (answer.id, len(answer.token_ids), answer.reason) == (3, 8, "length")
    assert answer.completion_tokens == 8
    assert ask(path, wire.Describe(1)).context > 0
    assert "echo_iterations_total" in ask(path, wire.Scrape(1)).text


@pytest.mark.parametrize(
    ("question", "kind", "field", "word"),
    [
        (request(prompt=[5, 999]), "invalid", "prompt", "token id 999"),
        (request(prompt=[]), "invalid", "prompt", "empty"),
        (request(prompt=[5] * 2000), "too_long", "prompt", "shorten it"),
        (request(structured={"regex": "("}), "invalid", "structured", "structured.regex"),
        (request(logit_bias={999: 1.5}), "invalid", "logit_bias", "token id 999"),
    ],
)
def test_a_question_that_cannot_be_answered_is_a_failure(question, kind, field, word, path):
    failure = ask(path, question)
    assert isinstance(failure, wire.Failure), failure
    assert (failure.kind, failure.field, word in failure.message) == (kind, field, True), failure


@pytest.mark.parametrize(
    ("written", "field", "word"),
    [
        ((b"temperature\x00", b"temperature\xff"), "temperature", "temperature is -1"),
        ((b"max_tokens\x08", b"max_tokens\x00"), "max_tokens", "max_tokens is 0"),
        ((b"max_tokens\x08", b"max_tokens\xc0"), None, "no message of the protocol"),
    ],
)
def test_parameters_are_checked_by_whoever_decodes_them(written, field, word, path, monkeypatch):
    """A client in another language may not check them itself."""
    framed = wire.framed
    monkeypatch.setattr(wire, "framed", lambda message: framed(message).replace(*written))
    failure = ask(path, request(7, temperature=0))
    assert isinstance(failure, wire.Failure), failure
    assert (failure.id, failure.kind, failure.field, word in failure.message) == (7, "invalid", field, True), failure


@pytest.mark.parametrize("part", ["add", "take"])
def test_an_answer_that_cannot_be_made_or_sent_fails_alone(part, path, monkeypatch):
    real = getattr(host.OpenAnswer, part)

    def faulty(self, *event):
        if self.question == 13:
            raise RuntimeError("a faulty part")
        return real(self, *event)

    monkeypatch.setattr(host.OpenAnswer, part, faulty)
    found: dict[int, wire.FromEngine | None] = {}

    def send(id: int) -> None:
        found[id] = ask(path, request(id, max_tokens=30))

    threads = [threading.Thread(target=send, args=(id,)) for id in (12, 13, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert isinstance(found[13], wire.Failure)
    assert found[13].kind == "failed"
    assert [len(found[id].token_ids) for id in (12, 14)] == [30, 30]


def test_a_client_that_has_seen_a_stop_string_ends_the_answer(path, service):
    before = service.statistics().ended.get("stop", 0)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(path)
        client.sendall(wire.framed(request(5, max_tokens=100, stop=("x",))))
        news, answers = [], received(client, 1)
        for tokens in answers:
            news.append(tokens)
            if len(news) == 1:
                client.sendall(wire.framed(wire.Stop(5, tokens=1)))
    assert len(news) > 1  # they come as they are made
    assert (news[-1].reason, news[-1].completion_tokens) == ("stop", 1)
    assert service.statistics().ended.get("stop", 0) == before + 1


def test_few_clients_get_snapshots_and_a_cancelled_one_leaves_room(path):
    clients = [socket.socket(socket.AF_UNIX) for _ in range(host.MAX_VIEWERS)]
    for client in clients:
        client.connect(path)
        client.sendall(wire.framed(wire.WatchSnapshots(1)))
        assert client.recv(1)  # of a snapshot
    refused = ask(path, wire.WatchSnapshots(1))
    assert (refused.kind, "clients get snapshots" in refused.message) == ("away", True)
    clients[0].sendall(wire.framed(wire.Cancel(1)))
    wait_until(lambda: isinstance(ask(path, wire.WatchSnapshots(1)), wire.Snapshot))
    for client in clients:
        client.close()


def test_nothing_is_answered_for_a_client_that_has_left(path, service, monkeypatch):
    step, opened, before = service.loop.step, threading.Event(), service.statistics().ended.get("cancelled", 0)
    monkeypatch.setattr(service.loop, "step", lambda: (opened.wait(30), step())[1])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(wire.framed(request(max_tokens=100)))
        wait_until(lambda: service.statistics().running + service.statistics().queued)
    for _ in range(3):  # the host has seen it leave before
        ask(path, wire.Describe(1), 30)
    opened.set()
    wait_until(lambda: service.statistics().ended.get("cancelled", 0) == before + 1, 60)


def test_many_long_answers_that_end_together_all_come(path, monkeypatch):
    """The door's one connection holds all its clients' answers: what it has not read waits in the answers."""
    monkeypatch.setattr(host, "FULL", 2**12)
    sizes: list[int] = []
    send = host.ClientConnection.send

    def measured(self, message) -> None:
        send(self, message)
        sizes.append(self.writer.transport.get_write_buffer_size())

    monkeypatch.setattr(host.ClientConnection, "send", measured)
    number, tokens = 12, 140
    details = {"logprobs": 20, "token_sources": True, "max_tokens": tokens}
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(path)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        for id in range(number):
            client.sendall(wire.framed(request(id, **details)))
        wait_until(lambda: len(sizes) > 3 and max(sizes) > host.FULL)  # it has not read yet
        pieces = [*received(client, number)]
    assert max(sizes) < 2**17  # a piece of each answer may go out before the first is seen to wait
    for id in range(number):
        own = [piece for piece in pieces if piece.id == id]
        assert len(own) > 1
        assert sum(len(piece.token_ids) for piece in own) == tokens
        assert sum(len(piece.logprobs) for piece in own) == sum(len(piece.sources) for piece in own) == tokens


def received(client: socket.socket, answers: int) -> Iterator[Event]:
    """Yield the pieces of so many answers."""
    decode = msgpack.Decoder(wire.FromEngine).decode
    file = client.makefile("rb")
    while answers:
        piece = decode(file.read(int.from_bytes(file.read(4))))
        answers -= bool(piece.reason)
        yield piece


def test_a_client_that_reads_nothing_fills_no_memory_and_holds_up_nobody(path, monkeypatch):
    monkeypatch.setattr(host, "FULL", 2**14)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.settimeout(0.5)
        questions = wire.framed(wire.Scrape(1)) * 100_000
        with pytest.raises(TimeoutError):
            client.sendall(questions)
        assert isinstance(ask(path, request()), Event)


def test_what_is_no_message_ends_its_connection_alone(path):
    for sent in (b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff", Path(__file__).read_bytes()[:40]):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    assert isinstance(ask(path, request()), Event)
