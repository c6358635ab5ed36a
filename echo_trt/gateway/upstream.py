"""Requests to the Triton model: one gRPC stream each, so that one can be stopped and none harms another."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from echo_trt.gateway.errors import ApiError, from_grpc, unavailable
from echo_trt.gateway.facts import Facts
from echo_trt.gateway.metrics import Metrics
from echo_trt.gateway.names import Names
from echo_trt.serving.protocol import FIRST
from echo_trt.serving.triton.tensors import INPUTS

DATATYPES = {tensor.name: tensor.datatype for tensor in INPUTS}
CODES = grpc.StatusCode.__members__
FACTS_S = 60.0  # how long facts hold: an engine may come back with another bundle while nobody asks
FRESH_S = 2.0  # text that came within this long ago proves the engine alive
SINGLE = frozenset({"describe", "tokenize"})  # inputs of questions that have one response
END_S = 5.0  # how long a stream may take to end that has said all, or was asked to stop
PROBE_S = 10.0  # how long a probe waits for its token, or for an iteration of the engine's
#: A server that is back is found within a second; gRPC's own defaults wait ever longer, and at least 20 seconds for
#: a connection that is neither made nor refused.
RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(frozen=True)
class Piece:
    """New text of one choice; the last one has a ``finish_reason`` and ``cached_tokens``."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # up to the end of this piece
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of the tokens of the text
    token_ids: list[int] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)  # who proposed the tokens of the text, where asked for
    in_thought: bool = False  # of the first one: whether the prompt has opened a thought


class Upstream:
    """One channel to the server. Made and used within one event loop."""

    def __init__(self, url: str, model: str, metrics: Metrics):
        self.model, self._metrics = model, metrics
        self._client = InferenceServerClient(url, channel_args=[*RECONNECT, ("grpc.max_receive_message_length", -1)])
        self._last_piece = float("-inf")
        self._facts: Facts | None = None
        self._asked_for_facts = float("-inf")
        self._probing = asyncio.Lock()
        self._ending: set[asyncio.Task] = set()

    async def close(self) -> None:
        """Wait for streams that are ending, and close the channel."""
        await asyncio.gather(*self._ending)
        await self._client.close()

    async def facts(self) -> Facts:
        """What the engine says of its model; asked now and then, and where it has been away. Raises ApiError."""
        facts = self._facts
        if facts is None or time.monotonic() - self._asked_for_facts > FACTS_S:
            self._asked_for_facts = time.monotonic()
            result = await self._single({"describe": True})
            self._facts = facts = Facts.read(_value(result, "description", b"").decode())
        return facts

    async def token_ids(self, inputs: Mapping[str, Any], names: Names) -> list[int]:
        """Of the prompt that ``inputs`` hold. Raises ApiError."""
        ids = (await self._single({**inputs, "tokenize": True}, names)).as_numpy("output_ids")
        return [] if ids is None else ids.reshape(-1).tolist()

    async def text(self, token_ids: list[int], names: Names) -> str:
        """Of tokens. Raises ApiError."""
        result = await self._single({"input_ids": token_ids, "tokenize": True}, names)
        text: bytes = _value(result, "text_output", b"")
        return text.decode("utf-8", "replace")

    async def snapshots(self) -> AsyncGenerator[str]:
        """Yield snapshots for some seconds, as JSON; the engine makes none once this is closed. Raises ApiError."""
        async with aclosing(self._results({"watch": True})) as results:
            async for result in results:
                if text := _value(result, "snapshot", b"").decode():
                    yield text

    async def _single(self, inputs: Mapping[str, Any], names: Names | None = None) -> InferResult:
        """The one response to a question that the engine's loop does not see. Raises ApiError."""
        try:
            async with asyncio.timeout(PROBE_S), aclosing(self._results(inputs, names)) as results:
                return await anext(results)
        except TimeoutError:
            raise unavailable() from None

    async def stream(self, inputs: Mapping[str, Any], names: Names | None = None) -> AsyncGenerator[Piece]:
        """Pieces as they come. Close it early and the engine drops the request. Raises ApiError."""
        begin, first, tokens = time.monotonic(), True, 0
        async with aclosing(self._results(inputs, names)) as results:
            async for result in results:
                piece = _piece(result, tokens)
                tokens = piece.completion_tokens
                self._last_piece = time.monotonic()
                if first and inputs.get("stream"):
                    self._metrics.first_text.observe(self._last_piece - begin)
                first = False
                yield piece

    async def _results(self, inputs: Mapping[str, Any], names: Names | None = None) -> AsyncGenerator[InferResult]:
        stream, done = _Stream(self._client, self.model, inputs), False
        try:
            while not done:
                answer = await stream.read()
                if answer is None:
                    raise unavailable()
                result, error = answer
                if error is not None:
                    done = True
                    raise _failure(error.message(), names)
                done = bool(SINGLE & inputs.keys()) or result.as_numpy("finish_reason") is not None
                yield result
        except (grpc.aio.AioRpcError, ApiError) as error:
            self._facts = None  # another engine may come
            if isinstance(error, ApiError):
                raise
            raise from_grpc(error.code().name, error.details() or "") from None
        finally:
            ending = asyncio.create_task(stream.end(stop=not done))  # whoever closes this need not wait for it
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def check(self) -> None:
        """Return where the engine works: text has just come, or it does so now. Raises ApiError where it does not.

        No queue is too full for a probe, and none has to wait for a place (``serving.service``).
        """
        async with self._probing:  # many who ask are one probe
            if self._silent_for() < FRESH_S:
                return
            probe = {"input_ids": [0], "max_tokens": 1, "ignore_eos": True, "priority": FIRST}
            try:
                async with asyncio.timeout(PROBE_S):
                    async for _ in self.stream(probe):
                        pass
            except TimeoutError:
                if self._silent_for() > FRESH_S:
                    raise unavailable() from None

    def _silent_for(self) -> float:
        return time.monotonic() - self._last_piece


class _Stream:
    """A request on a gRPC stream of its own.

    Nothing here cancels the stream, or a read of it, which would be the same: Triton 2.51 can die of a cancellation
    that meets the stream's own end. A request is stopped by a second one on the same stream.
    """

    def __init__(self, client: InferenceServerClient, model: str, inputs: Mapping[str, Any]):
        tensors = [_tensor(name, value) for name, value in inputs.items()]  # here: an error in _requests would hang
        self._model, self._stop, self._over = model, False, asyncio.Event()
        self._call = client.stream_infer(self._requests(tensors))
        self._reading: asyncio.Future | None = None

    async def read(self) -> tuple[InferResult, InferenceServerException] | None:
        """The next result or error, None at the end. Raises AioRpcError."""
        self._reading = asyncio.ensure_future(anext(self._call, None))
        return await asyncio.shield(self._reading)

    async def end(self, stop: bool) -> None:
        """Wait for the stream's end, where ``stop`` is true after asking for it; never raises."""
        self._stop = stop
        self._over.set()
        with suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(END_S):
                if self._reading and await self._reading is not None:
                    while await self.read() is not None:
                        pass
        self._call.cancel()  # does nothing to a stream that has ended

    async def _requests(self, tensors: list[InferInput]) -> AsyncIterator[dict[str, Any]]:
        request = {"model_name": self._model, "request_id": secrets.token_hex(16), "parameters": {"error_codes": True}}
        yield {**request, "inputs": tensors}
        await self._over.wait()
        if self._stop:
            yield {**request, "inputs": [_tensor("stop", True)]}


def _failure(message: str, names: Names | None) -> ApiError:
    """The model's own errors begin with a code, as was asked for; what Triton says itself is no client's mistake."""
    code, colon, details = message.partition(": ")
    return from_grpc(code, details, names) if colon and code in CODES else from_grpc("UNAVAILABLE", message)


def _tensor(name: str, value: Any) -> InferInput:
    datatype = DATATYPES[name]
    values = value if isinstance(value, list) else [value]
    encoded = [text.encode() for text in values] if datatype == "BYTES" else values
    array = np.array(encoded, triton_to_np_dtype(datatype))[None]  # a batch of one
    tensor = InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _value(result: InferResult, name: str, default: Any) -> Any:
    """The only value of an output."""
    array = result.as_numpy(name)
    return default if array is None or array.size == 0 else array.reshape(-1)[0]


def _piece(result: InferResult, before: int) -> Piece:
    """``before``: completion tokens of the pieces before this one."""
    text = _value(result, "text_output", b"").decode("utf-8", "replace")
    new = result.as_numpy("output_ids")
    ids = [] if new is None else new.reshape(-1).tolist()
    reason = _value(result, "finish_reason", b"").decode() or None
    tokens = int(_value(result, "completion_tokens", before + len(ids)))
    if reason == "deadline":
        if not tokens:
            raise from_grpc("DEADLINE_EXCEEDED", "")
        reason = "length"  # OpenAI's word for a text that was cut short
    logprobs, sources = (json.loads(_value(result, name, b"[]")) for name in ("logprobs", "token_sources"))
    prompt, cached = (int(_value(result, name, 0)) for name in ("prompt_tokens", "cached_tokens"))
    in_thought = bool(_value(result, "in_thought", False))
    return Piece(text, reason, prompt, cached, tokens, logprobs, ids, sources, in_thought)
