"""KV events of a server, as a subscriber that knows vLLM's form alone receives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from driving import prompt_ids
from engine.service.served import Served

zmq = pytest.importorskip("zmq")
TOPIC = "kv@10.0.0.7@close"


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Event(msgspec.Struct, tag=True):
    """Decodes fields as vLLM names them; those without a default must be there."""


class BlockStored(Event):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class BlockRemoved(Event):
    block_hashes: list[int | bytes]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Event):
    pass


class Router:
    """Keeps what it is told: block -> the text up to its end. It asks for messages that it has missed."""

    def __init__(self, events: str, replays: str) -> None:
        self.texts: dict[int | bytes, list[int]] = {}
        self.number = self.removed = self.cleared = 0
        context = zmq.Context.instance()
        self.events, self.replays = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        self.events.subscribe(b"kv@")
        self.events.connect(events)
        self.replays.connect(replays)
        self.replays.rcvtimeo = 60_000

    def listen(self) -> None:
        """Take what comes until nothing does."""
        while self.events.poll(100):
            topic, number, payload = self.events.recv_multipart()
            assert topic == TOPIC.encode()
            if int.from_bytes(number, "big") == self.number:
                self.take(payload)
            elif int.from_bytes(number, "big") > self.number:
                self.catch_up()

    def catch_up(self) -> None:
        self.replays.send_multipart([b"", self.number.to_bytes(8, "big")])
        while True:
            _, number, payload = self.replays.recv_multipart()
            if number == b"\xff" * 8:
                break
            assert number == self.number.to_bytes(8, "big")
            self.take(payload)

    def take(self, payload: bytes) -> None:
        self.number += 1
        for event in msgspec.msgpack.decode(payload, type=EventBatch).events:
            match event:
                case BlockStored(hashes, parent, tokens, 32, None, "GPU", None):
                    assert len(tokens) == 32 * len(hashes)
                    text = [] if parent is None else self.texts[parent]
                    for i, each in enumerate(hashes):
                        self.texts[each] = text = text + tokens[32 * i : 32 * (i + 1)]
                case BlockRemoved(hashes, "GPU"):
                    self.removed += len([self.texts.pop(each) for each in hashes])
                case AllBlocksCleared():
                    self.texts.clear()
                    self.cleared += 1


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("kv")
    return [f"ipc://{folder / name}" for name in ("events", "replays")]


@pytest.fixture(scope="module")
def server(roomy_bundle, endpoints, tmp_path_factory) -> Iterator[Served]:
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": TOPIC}
    config |= {"endpoint": endpoints[0], "replay_endpoint": endpoints[1]}
    log = tmp_path_factory.mktemp("served") / "log"
    with Served(roomy_bundle, log, "--kv-events-config", json.dumps(config)).wait_for("serving") as served:
        yield served


def test_a_router_of_vllm_s_events_knows_what_the_cache_holds(server, endpoints):
    ask = lambda prompt: server.complete(prompt, max_tokens=2)  # noqa: E731
    ask(prompt_ids(40, 0))  # before anybody listens
    router = Router(*endpoints)
    first, second = prompt_ids(100, 1), [*prompt_ids(100, 1)[:64], *prompt_ids(60, 2)]
    for prompt in (first, second):
        ask(prompt)
    router.catch_up()
    for prompt in (prompt_ids(40, 0)[:32], first[:96], second[:96]):
        assert prompt in router.texts.values()
    for number in range(10, 30):
        ask(prompt_ids(400, number))
        router.listen()
    assert router.removed > 100
    assert router.cleared == 1
    assert len(router.texts) == server.rest()["echo_blocks_cached"]
