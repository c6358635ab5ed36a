"""Requests to the Triton model: one gRPC stream each, so that one can be cancelled and none harms another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient, InferResult

from echo_trt.gateway.errors import ApiError, from_grpc, unavailable
from echo_trt.gateway.metrics import Metrics

#: input -> Triton's name of its type, numpy's type
TYPES = {
    "text_input": ("BYTES", np.object_),
    "chat_messages": ("BYTES", np.object_),
    "stop_words": ("BYTES", np.object_),
    "input_ids": ("INT32", np.int32),
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "presence_penalty": ("FP32", np.float32),
    "frequency_penalty": ("FP32", np.float32),
    "repetition_penalty": ("FP32", np.float32),
    "logit_bias_ids": ("INT32", np.int32),
    "logit_bias": ("FP32", np.float32),
    "min_length": ("INT32", np.int32),
    "return_log_probs": ("BOOL", np.bool_),
    "top_logprobs": ("INT32", np.int32),
    "seed": ("UINT64", np.uint64),
    "ignore_eos": ("BOOL", np.bool_),
    "stream": ("BOOL", np.bool_),
    "exclude_input_in_output": ("BOOL", np.bool_),
    "priority": ("INT32", np.int32),
    "deadline_ms": ("INT32", np.int32),
}
FRESH_S = 2.0  # text that came within this long ago proves the engine alive
BUSY_S = 30.0  # a full queue is no illness while text still came within this long
FIRST = -1  # a probe's priority: before all clients'
END_S = 5.0  # how long a stream that has said all may take to end
PROBE_S = 10.0  # how long a probe waits for its token


@dataclass(frozen=True)
class Piece:
    """New text of one choice; the last one carries the rest."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of the tokens of the text


class Upstream:
    """One channel to the server. Made and used within one event loop."""

    def __init__(self, url: str, model: str, metrics: Metrics):
        self.model, self._metrics = model, metrics
        self._client = InferenceServerClient(url)
        self._last_piece = float("-inf")
        self._probing = asyncio.Lock()

    async def close(self) -> None:
        await self._client.close()

    async def stream(self, inputs: Mapping[str, Any]) -> AsyncIterator[Piece]:
        """Pieces as they come. Close it early and the engine drops the request. Raises ApiError."""
        tensors = [_tensor(name, value) for name, value in inputs.items()]  # here: an error within _once would hang
        call = self._client.stream_infer(_once(self.model, tensors), headers={"triton_grpc_error": "true"})
        begin, first, done = time.monotonic(), True, False
        try:
            async for result, error in call:
                if error is not None:  # a server that does not know the header tells no code
                    raise from_grpc("INTERNAL", error.message())
                piece = _piece(result)
                self._last_piece = time.monotonic()
                if first:
                    self._metrics.first_piece(self._last_piece - begin)
                first, done = False, piece.finish_reason is not None
                yield piece
            if not done:
                raise unavailable()
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error.code().name, error.details() or "") from None
        except ApiError:
            done = True
            raise
        finally:
            if done:
                await _end(call)
            call.cancel()  # does nothing to a stream that has ended

    async def check(self) -> None:
        """Return where the engine answers: it has just done so, or does so now. Raises ApiError where it does not."""
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
            except ApiError as error:
                if error.status_code != 429 or self._silent_for() > BUSY_S:
                    raise

    def _silent_for(self) -> float:
        return time.monotonic() - self._last_piece


async def _end(call: AsyncIterator) -> None:
    """Wait for the end of a stream that has said all. Triton 2.51 can die of a cancellation that meets its own end."""
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(END_S):
            async for _ in call:
                pass


async def _once(model: str, tensors: list[InferInput]) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": model, "inputs": tensors}


def _tensor(name: str, value: Any) -> InferInput:
    kind, dtype = TYPES[name]
    values = value if isinstance(value, list) else [value]
    array = np.array([v.encode() for v in values] if kind == "BYTES" else values, dtype)[None]  # a batch of one
    tensor = InferInput(name, array.shape, kind)
    tensor.set_data_from_numpy(array)
    return tensor


def _piece(result: InferResult) -> Piece:
    def value(name: str, default: Any) -> Any:
        array = result.as_numpy(name)
        return default if array is None or array.size == 0 else array.reshape(-1)[0]

    text = value("text_output", b"").decode("utf-8", "replace")
    reason, tokens = value("finish_reason", b"").decode() or None, int(value("completion_tokens", 0))
    if reason == "deadline":
        if not tokens:
            raise from_grpc("DEADLINE_EXCEEDED", "")
        reason = "length"  # OpenAI's word for a text that was cut short
    logprobs = json.loads(value("logprobs", b"[]"))
    return Piece(text, reason, int(value("prompt_tokens", 0)), tokens, logprobs)
