"""The protocol between an engine process and its clients: msgpack messages with a length prefix on a Unix socket.

A client numbers its requests; every reply has the request's number. The engine answers ``Submit`` by events, the last
one with a reason, or by a failure, and ``WatchSnapshots`` by snapshots until the client cancels it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Literal

from msgspec import MsgspecError, Struct, msgpack

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import ANYONE, Event, Sender
from echo_trt.errors import TooLong, UserError

LARGEST = 2**26  # bytes of a message; larger: one message can take more memory
_LENGTH = struct.Struct(">I")

#: Why a question has no answer: its mistake; a prompt longer than the context; latency targets that cannot be kept; a
#: full queue; an engine that stops or is not there; the client's own wish; the engine's fault.
FailureKind = Literal["invalid", "too_long", "queue_full", "away", "cancelled", "failed"]


class Numbered(Struct, tag=True):
    """A message, with the number of the request that it asks or answers."""

    id: int = 0


class Submit(Numbered, kw_only=True, omit_defaults=True):
    """A request.

    latency_class  name of targets that ``params`` do not have themselves
    deadline_ms    from its arrival, after which the answer ends as it is; 0: never
    streamed       whether tokens are wanted as they come
    request_id     the client's, for lines of the log
    calls          of each tool that may be called, what is known of a call: as of ``sources.calls.skeleton``
    """

    prompt: list[int]
    params: SamplingParams
    latency_class: str = ""
    priority: int = 0
    deadline_ms: int = 0
    streamed: bool = False
    sender: Sender = ANYONE
    request_id: str = ""
    calls: list[list[list[int]]] = []


class Cancel(Numbered):
    """Cancels an earlier request whose reply is not complete."""


class Stop(Numbered, kw_only=True):
    """Ends an earlier request, whose first ``tokens`` have completed a stop string: the client makes the text."""

    tokens: int


class Describe(Numbered):
    """A question for what the model is, answered by ``ModelInfo``."""


class WatchSnapshots(Numbered):
    """A question for snapshots (``engine.service.snapshots``)."""


class Scrape(Numbered):
    """A question for the engine's metrics in Prometheus' text format."""


class Failure(Numbered, kw_only=True, omit_defaults=True):
    """Why a question has no answer.

    field        the parameter that the message is about, where it is known
    retry_after  seconds after which the question may be answered, where that is known
    """

    kind: FailureKind
    message: str
    field: str | None = None
    retry_after: int | None = None


class MetricsText(Numbered, kw_only=True):
    """The answer to ``Scrape``."""

    text: str


class Snapshot(Numbered, kw_only=True):
    """What the engine does, as of ``engine.service.snapshots``."""

    content: dict[str, Any]


class ModelInfo(Numbered, kw_only=True):
    """What a client must know that makes prompts and reads answers.

    bundle                     its folder, which has the tokenizer
    context                    tokens of a prompt and its answer, at most
    sampling                   parameters of requests that leave them out, where the model recommends any
    special_tokens_in_content  whether names of control tokens in a chat's texts are control tokens
    """

    bundle: str
    context: int
    sampling: dict[str, float]
    special_tokens_in_content: bool = False


class _Number(Struct):
    id: int


def failure_for(mistake: UserError) -> Failure:
    """Return the failure that tells a user's mistake."""
    kind: FailureKind = "too_long" if isinstance(mistake, TooLong) else "invalid"
    return Failure(kind=kind, message=str(mistake), field=mistake.field)


ToEngine = Submit | Stop | Cancel | Describe | WatchSnapshots | Scrape
FromEngine = Event | Failure | MetricsText | Snapshot | ModelInfo
_decode_request = msgpack.Decoder(ToEngine).decode
_decode_answer = msgpack.Decoder(FromEngine).decode
_decode_number = msgpack.Decoder(_Number).decode
_encode = msgpack.Encoder().encode


def framed(message: ToEngine | FromEngine) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_request(reader: asyncio.StreamReader) -> ToEngine | Failure | None:
    """Read the next message to an engine, or what answers one that may not be asked; None: the client has left."""
    body = await _body(reader)
    if body is None:
        return None
    try:
        return _decode_request(body)
    except UserError as mistake:  # of SamplingParams
        sentence, field = str(mistake), mistake.field
    except MsgspecError as mistake:
        sentence, field = f"this is no message of the protocol ({mistake}).", None
    try:
        return Failure(_decode_number(body).id, kind="invalid", message=sentence, field=field)
    except MsgspecError:  # nobody can be answered
        return None


async def read_answer(reader: asyncio.StreamReader) -> FromEngine | None:
    """Read the next message from an engine; None: it has left."""
    body = await _body(reader)
    return None if body is None else _decode_answer(body)


async def _body(reader: asyncio.StreamReader) -> bytes | None:
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length) if length <= LARGEST else None
    except (asyncio.IncompleteReadError, OSError):
        return None
