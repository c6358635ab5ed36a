"""The protocol between an engine process and its clients: msgpack messages with a length prefix on a Unix socket.

A client numbers its requests; every reply has the request's number. The engine answers ``Submit`` by pieces, the last
one with a finish reason, or by a failure, and ``WatchSnapshots`` by snapshots until the client cancels it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, NamedTuple

from msgspec import Struct, msgpack

LARGEST = 2**26  # bytes of a message; larger: one message can take more memory
_LENGTH = struct.Struct(">I")


class Numbered(Struct, tag=True):
    """A message, with the number of the request that it asks or answers."""

    id: int


class Sender(NamedTuple):
    """Whose request it is.

    tenant  who has to share slots with others; empty: with an engine without keys everyone is one
    salt    of the prefix cache: requests of one salt find each other's text; empty: that of all without one
    """

    tenant: bytes = b""
    salt: bytes = b""


ANYONE = Sender()


class Submit(Numbered):
    """A request. ``inputs``: plain values by their names in ``engine.process.inputs.INPUTS``.

    request_id  the client's, for lines of the log
    """

    inputs: dict[str, Any]
    request_id: str = ""
    sender: Sender = ANYONE


class Cancel(Numbered):
    """Cancels an earlier request whose reply is not complete."""


class Describe(Numbered):
    """A question for what the model is, answered by ``ModelInfo``."""


class Tokenize(Numbered):
    """A question for the tokens of a prompt, or for the text of ``input_ids``."""

    inputs: dict[str, Any]


class WatchSnapshots(Numbered):
    """A question for snapshots (``engine.service.snapshots``)."""


class AskForecast(Numbered):
    """A question for what a request of this shape has to expect. ``latency``: as the input of that name."""

    prompt_tokens: int
    max_tokens: int
    latency: str


class Scrape(Numbered):
    """A question for the engine's metrics in Prometheus' text format."""


class TextPiece(Numbered, omit_defaults=True):
    """New text of an answer.

    logprobs, sources  JSON of entries of tokens whose text is in ``text``; empty where they are not asked for
    in_thought         of the first piece: whether the prompt has opened a thought
    finish_reason      of the last piece
    drafted, accepted  of the last piece: draft tokens of each verification that had any, and the accepted ones
    stop_string        of the last piece: the stop string that ended the text, if one did
    queue_ms           of the last piece: until the engine took the request; None: it never did
    first_token_ms     of the last piece: until the first token, the queue included; None: it never came
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: str = ""
    sources: str = ""
    in_thought: bool = False
    prompt_tokens: int = 0
    finish_reason: str | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: list[int] = []
    accepted: list[int] = []
    stop_string: str = ""
    queue_ms: float | None = None
    first_token_ms: float | None = None


class Failure(Numbered):
    """Why a question has no answer.

    code   a gRPC status by its name; of a prompt that is too long OUT_OF_RANGE
    field  the input that the message is about, where it is known
    """

    code: str
    message: str
    field: str | None = None


class TokensReply(Numbered):
    """The answer to ``Tokenize``."""

    token_ids: list[int]
    text: str | None = None


class TextReply(Numbered):
    """The answer to ``Scrape`` or ``AskForecast``, or a snapshot."""

    text: str


class ThinkTokens(Struct):
    """The texts around a thought, and the token that closes it."""

    opens: str
    closes: str
    closing_token: int


class ModelInfo(Numbered):
    """What a client that reads answers must know of the model.

    template     the chat template's text
    tokens       names of added tokens that the template writes
    variables    variables of the template that a request may set
    takes_tools  whether the template shows tools to the model
    thinking     None for a model that does not think
    context      tokens of a prompt and its answer, at most
    sampling     parameters of requests that leave them out, where the model recommends any
    size         bytes of the bundle
    """

    template: str
    tokens: list[str]
    variables: list[str]
    takes_tools: bool
    thinking: ThinkTokens | None
    context: int
    sampling: dict[str, float]
    size: int = 0


ToEngine = Submit | Cancel | Describe | Tokenize | WatchSnapshots | AskForecast | Scrape
FromEngine = TextPiece | Failure | TokensReply | TextReply | ModelInfo
_decode_request = msgpack.Decoder(ToEngine).decode
_decode_answer = msgpack.Decoder(FromEngine).decode
_encode = msgpack.Encoder().encode


def framed(message: ToEngine | FromEngine) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_request(reader: asyncio.StreamReader) -> ToEngine | None:
    """Read the next message to an engine; None: the client has left."""
    body = await _body(reader)
    return None if body is None else _decode_request(body)


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
