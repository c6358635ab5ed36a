"""KV events over ZMQ in vLLM's form: which texts the prefix cache holds, for routers of others.

A message is a topic, its number (8 bytes, big-endian) and msgpack: [Unix time, events, data-parallel rank]. An event is
a map, as vLLM has written it since June 2026; routers that read the arrays of before read maps too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from echo_trt.engine.kv_blocks import PrefixCache, rows
from echo_trt.errors import UserError, described, shown
from echo_trt.speculation.pack import BLOCK

OPTION = "--kv-events-config"
END = (-1).to_bytes(8, "big", signed=True)  # number of the message that ends a replay
_Number = Annotated[int, msgspec.Meta(ge=0)]


class KVEventsConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Hold vLLM's object of the option.

    buffer_steps  messages kept for replays
    hwm           messages that wait for a slow subscriber; larger: more memory, fewer are lost
    """

    enable_kv_cache_events: bool = True
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: _Number = 10_000
    hwm: _Number = 100_000
    max_queue_size: _Number = 100_000  # vLLM's; here only ZMQ has a queue
    topic: str = ""


def read_config(text: str) -> KVEventsConfig | None:
    """Read the option's text; None: nothing is published. Raises UserError."""
    try:
        config = msgspec.json.decode(text or '{"publisher": "null"}', type=KVEventsConfig)
    except msgspec.MsgspecError as error:
        fields = ", ".join(KVEventsConfig.__struct_fields__)
        raise UserError(f"{OPTION} is {shown(text)} ({error}); give a JSON object of {fields}.") from None
    if not config.enable_kv_cache_events or config.publisher == "null":
        return None
    if not find_spec("zmq"):
        raise UserError(f"{OPTION} needs pyzmq, which is not installed; pip install 'echo-trt[kv-events]'.")
    return config


def publish_kv_events(cache: PrefixCache, text: str) -> None:
    """Publish what ``cache`` gains and loses, where the option's ``text`` asks for it. Raises UserError."""
    if config := read_config(text):
        cache.listener = KVEventPublisher(config)


class KVEventPublisher:
    """Publish on the engine's thread: ZMQ queues a message or drops it. Replays have a thread of their own."""

    def __init__(self, config: KVEventsConfig):
        import zmq

        self._topic, self._number = config.topic.encode(), count()
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._before: list[dict[str, Any]] = [{"type": "AllBlocksCleared"}]  # of an engine that ran here before
        context, endpoint = zmq.Context(), config.endpoint
        self._socket = context.socket(zmq.PUB)
        self._socket.set_hwm(config.hwm)
        try:
            binds = endpoint.startswith("ipc:") or "*" in endpoint or "::" in endpoint  # else it connects, as in vLLM
            (self._socket.bind if binds else self._socket.connect)(endpoint)
            if endpoint := config.replay_endpoint or "":
                replays = context.socket(zmq.ROUTER)
                replays.bind(endpoint)
                threading.Thread(target=self._replay, args=(replays,), name="kv-replays", daemon=True).start()
        except zmq.ZMQError as error:
            reason = f"{OPTION} has {endpoint!r} ({described(error)})"
            raise UserError(f"{reason}; give a free address such as tcp://*:5557.") from None

    def stored(self, keys: Sequence[bytes], tokens: np.ndarray, indices: Sequence[int]) -> None:
        """Do as ``prefix_cache.Listener``: an event for each row of blocks, with the hash of the block before it."""
        events = [
            {
                "type": "BlockStored",
                "block_hashes": list(map(block_hash, keys[first:last])),
                "parent_block_hash": block_hash(keys[first - 1]) if first else None,
                "token_ids": tokens[first * BLOCK : last * BLOCK].tolist(),
                "block_size": BLOCK,
                "lora_id": None,
                "medium": "GPU",  # vLLM's word for the engine's own memory, on a CPU too
                "lora_name": None,
            }
            for first, last in rows(indices)
        ]
        self._publish(events)

    def removed(self, keys: Sequence[bytes]) -> None:
        self._publish([{"type": "BlockRemoved", "block_hashes": list(map(block_hash, keys)), "medium": "GPU"}])

    def _publish(self, events: list[dict[str, Any]]) -> None:
        events, self._before = self._before + events, []
        number = next(self._number).to_bytes(8, "big")
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._socket.send_multipart([self._topic, number, payload])
        self._sent.append((number, payload))

    def _replay(self, socket: Any) -> None:
        """Answer requests of [number] with the kept messages from that one on, and the end."""
        while True:
            client, *_, first = socket.recv_multipart()
            kept = [message for message in self._sent.copy() if message[0] >= first]
            for number, payload in (*kept, (END, b"")):
                socket.send_multipart([client, b"", number, payload])


def block_hash(key: bytes) -> int:
    """Return a key's first 64 bits, as vLLM has block hashes: unsigned."""
    return int.from_bytes(key[:8], "big")
