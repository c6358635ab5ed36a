"""The protocol between an engine process and its clients: msgpack messages with a length prefix on a Unix socket.

A client numbers its requests; every reply has the request's number. The engine answers ``Submit`` by pieces, the last
one with a finish reason, or by a failure, and ``WatchSnapshots`` by snapshots until the client cancels it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Literal, NamedTuple

from msgspec import MsgspecError, Struct, msgpack

from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError

LARGEST = 2**26  # bytes of a message; larger: one message can take more memory
_LENGTH = struct.Struct(">I")

#: Why a question has no answer: its mistake; a prompt longer than the context; latency targets that cannot be kept; a
#: full queue; an engine that stops or is not there; the client's own wish; the engine's fault.
FailureKind = Literal["invalid", "too_long", "late", "queue_full", "away", "cancelled", "failed"]


class Numbered(Struct, tag=True):
    """A message, with the number of the request that it asks or answers."""

    id: int = 0


class Sender(NamedTuple):
    """Whose request it is.

    tenant  who has to share slots with others; empty: with an engine without keys everyone is one
    salt    of the prefix cache: requests of one salt find each other's text; empty: that of all without one
    """

    tenant: bytes = b""
    salt: bytes = b""


ANYONE = Sender()


class ChatPrompt(Struct):
    """A chat for the model's template, as Hugging Face's templates take it. ``variables``: the template's own."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    variables: dict[str, Any] = {}


PromptInput = list[int] | str | ChatPrompt  # token ids as they are, a text, or a chat


class Submit(Numbered, kw_only=True, omit_defaults=True):
    """A request.

    latency_class  name of targets that ``params`` do not have themselves
    deadline_ms    from its arrival, after which the answer ends as it is; 0: never
    streamed       whether text is wanted as it comes
    echo           whether the prompt's text precedes the answer's
    request_id     the client's, for lines of the log
    """

    prompt: PromptInput
    params: SamplingParams
    latency_class: str = ""
    priority: int = 0
    deadline_ms: int = 0
    streamed: bool = False
    echo: bool = False
    sender: Sender = ANYONE
    request_id: str = ""


class Cancel(Numbered):
    """Cancels an earlier request whose reply is not complete."""


class Describe(Numbered):
    """A question for what the model is, answered by ``ModelInfo``."""


class Tokenize(Numbered, kw_only=True):
    """A question for the tokens of a prompt. ``special_tokens``: those of the tokenizer around a text, too."""

    prompt: str | ChatPrompt
    special_tokens: bool = True


class Detokenize(Numbered, kw_only=True):
    """A question for the text of tokens."""

    tokens: list[int]


class WatchSnapshots(Numbered):
    """A question for snapshots (``engine.service.snapshots``)."""


class AskForecast(Numbered, kw_only=True):
    """A question for what a request of this shape has to expect, answered by ``ForecastReply``."""

    prompt_tokens: int
    max_tokens: int
    latency: dict[str, float] | None = None
    latency_class: str = ""


class Scrape(Numbered):
    """A question for the engine's metrics in Prometheus' text format."""


class LogprobEntry(Struct, array_like=True):
    """A token of an answer or of an echoed prompt, by the bytes that it adds to the text.

    logprob  natural logarithm; None: a prompt's first token has none
    top      bytes and log-probabilities of the best tokens at its position, best first
    offset   where its text begins, in characters of the whole text
    """

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]
    offset: int


class SourceEntry(Struct, array_like=True):
    """Who proposed a token (``TokenSource``), by the bytes that the token adds to the text."""

    token: bytes
    source: str
    probability: float | None


class TextPiece(Numbered, omit_defaults=True):
    """New text of an answer.

    logprobs, sources  where asked for, entries of tokens whose text is in ``text``
    in_thought         of the first piece: whether the prompt has opened a thought
    finish_reason      of the last piece
    drafted, accepted  of the last piece: draft tokens of each verification that had any, and the accepted ones
    stop_string        of the last piece: the stop string that ended the text, if one did
    queue_ms           of the last piece: until the engine took the request; None: it never did
    first_token_ms     of the last piece: until the first token, the queue included; None: it never came
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[LogprobEntry] = []
    sources: list[SourceEntry] = []
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


class Failure(Numbered, kw_only=True, omit_defaults=True):
    """Why a question has no answer.

    field        the parameter that the message is about, where it is known
    retry_after  seconds after which the question may be answered, where that is known
    """

    kind: FailureKind
    message: str
    field: str | None = None
    retry_after: int | None = None


class TokensReply(Numbered, kw_only=True):
    """The answer to ``Tokenize``."""

    token_ids: list[int]


class TextReply(Numbered, kw_only=True):
    """The answer to ``Detokenize`` or ``Scrape``."""

    text: str


class ForecastTimes(Struct):
    """Milliseconds; None: nothing like it has run yet. ``error``: relative, of forecasts so far, by ttft and tpot."""

    ttft_ms: float | None
    tpot_ms: float | None
    total_ms: float | None
    error: dict[str, float | None]


class ForecastReply(Numbered, kw_only=True):
    """The answer to ``AskForecast``."""

    forecast: ForecastTimes


class Snapshot(Numbered, kw_only=True):
    """What the engine does, as of ``engine.service.snapshots``."""

    content: dict[str, Any]


class ThinkTokens(Struct):
    """The texts around a thought, and the token that closes it."""

    opens: str
    closes: str
    closing_token: int


class ModelInfo(Numbered, kw_only=True):
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


class _Number(Struct):
    id: int


ToEngine = Submit | Cancel | Describe | Tokenize | Detokenize | WatchSnapshots | AskForecast | Scrape
FromEngine = TextPiece | Failure | TokensReply | TextReply | ForecastReply | Snapshot | ModelInfo
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
