"""An engine in a Triton server: one gRPC stream per request, so that one can be stopped and none harms another."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from echo_trt.gateway.engine_metrics import EngineMetrics
from echo_trt.gateway.errors import ApiError, from_grpc, unavailable
from echo_trt.gateway.metrics import Metrics
from echo_trt.gateway.names import Names
from echo_trt.gateway.upstream import SINGLE, Upstream
from echo_trt.serving import wire
from echo_trt.serving.inputs import INPUTS

DATATYPES = {tensor.name: tensor.datatype for tensor in INPUTS}
CODES = grpc.StatusCode.__members__
END_S = 5.0  # how long a stream may take to end that has said all, or was asked to stop
#: A server that is back is found within a second; gRPC's own defaults wait ever longer, and at least 20 seconds for
#: a connection that is neither made nor refused.
RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class TritonUpstream(Upstream):
    """One channel to the server. ``theirs``: Triton's endpoint of metrics, from which the engine's come."""

    def __init__(self, url: str, model: str, metrics: Metrics, theirs: EngineMetrics | None = None):
        super().__init__(metrics)
        self.model = model
        self._client = InferenceServerClient(url, channel_args=[*RECONNECT, ("grpc.max_receive_message_length", -1)])
        self._theirs = theirs
        self._ending: set[asyncio.Task] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._ending)
        await self._client.close()

    async def engine_metrics(self) -> bytes | None:
        return await self._theirs.text() if self._theirs else None

    async def _messages(self, inputs: Mapping[str, Any], names: Names | None) -> AsyncGenerator[wire.FromEngine]:
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
                yield _message(result)
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error.code().name, error.details() or "") from None
        finally:
            ending = asyncio.create_task(stream.end(stop=not done))  # whoever closes this need not wait for it
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


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


def _text(result: InferResult, name: str) -> str:
    text: bytes = _value(result, name, b"")
    return text.decode("utf-8", "replace")


def _message(result: InferResult) -> wire.FromEngine:
    """A response as a message of the socket's protocol."""
    for name in ("description", "snapshot"):
        if result.as_numpy(name) is not None:
            return wire.Text(0, _text(result, name))
    new = result.as_numpy("output_ids")
    ids = [] if new is None else new.reshape(-1).tolist()
    if result.as_numpy("prompt_tokens") is None:
        return wire.Tokens(0, ids, _text(result, "text_output"))
    return wire.Piece(
        0,
        _text(result, "text_output"),
        ids,
        _text(result, "logprobs"),
        _text(result, "token_sources"),
        bool(_value(result, "in_thought", False)),
        int(_value(result, "prompt_tokens", 0)),
        _text(result, "finish_reason") or None,
        int(_value(result, "completion_tokens", 0)),
        int(_value(result, "cached_tokens", 0)),
    )
