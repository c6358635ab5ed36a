"""Replies on their way to Triton: one thread sends them all, asks who has gone, and keeps the metrics."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from echo_trt.adapters.triton.request import Reply
from echo_trt.engine.process.pending import failure_of
from echo_trt.engine.process.wire import Failure, FailureKind
from echo_trt.engine.request import ERRORS, Event
from echo_trt.engine.service.metric_aliases import TENSORRT_LLM
from echo_trt.engine.service.metrics import HISTOGRAMS, EngineMetrics
from echo_trt.engine.service.service import Service
from echo_trt.engine.text.entries import logprob_object, source_object

log = logging.getLogger(__name__)

#: gRPC's statuses by kinds of failures; Triton calls the first one INVALID_ARG.
CODES: dict[FailureKind, str] = {
    "invalid": "INVALID_ARGUMENT",
    "too_long": "INVALID_ARGUMENT",
    "queue_full": "UNAVAILABLE",
    "away": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "failed": "INTERNAL",
}
#: Seconds between two looks at whether clients are still there, between two updates of the metrics; too long a call.
LOOK, FLUSH, STUCK = 0.05, 0.25, 15.0
LOOKED_AT = 16  # clients checked at once, in turn; larger: one that leaves is noticed sooner, at the engine's cost
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
#: An event of a reply, None with it where the reply begins; None: close.
QueuedReply = tuple[Reply, Event | None] | None


class Replies:
    """Any thread may ``put`` the events of replies, which may come before a reply begins.

    Once there is a file ``drain`` in the folder ``signals``, nothing new is taken; ``drained`` appears there when the
    last reply has been sent. (Triton itself refuses new requests once it stops, but may abort while it does.)
    """

    def __init__(self, service: Service, metrics: EngineMetrics, model: str, signals: Path | None = None):
        """``model``: its name in metrics. ``signals``: see above."""
        self._service, self._metrics, self._model, self._signals = service, metrics, model, signals
        self._events: queue.SimpleQueue[QueuedReply] = queue.SimpleQueue()
        self._open: dict[Reply, None] = {}  # in the order in which their clients are looked at
        self._armed = float("-inf")
        self._thread = threading.Thread(target=self._run, name="replies", daemon=True)
        self._thread.start()

    def put(self, reply: Reply, event: Event | None) -> None:
        """``event`` None: the reply has begun, and its client is to be watched."""
        self._events.put((reply, event))

    def close(self) -> None:
        self._events.put(None)
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        self._arm()
        bridge = Bridge(self._metrics, pb_utils.MetricFamily, self._model)
        looked = flushed = time.monotonic()
        running, server = True, triton_process()
        while running:
            if os.getppid() != server:  # Triton was killed, and would leave this process behind
                os._exit(1)
            changed: dict[Reply, Event] = {}
            for item in self._take():
                if item is None:
                    running = False
                else:
                    reply, event = item
                    if event is not None:
                        self._arm()
                        self._merge(reply, event)
                        changed[reply] = event
                    elif not reply.ended:
                        self._open[reply] = None
            for reply, event in changed.items():
                if event.reason or (reply.streamed and reply.out.unsent and not reply.broken):
                    self._send(reply, event)
            now = time.monotonic()
            if now - looked >= LOOK:
                looked = now
                self._cancel_abandoned()
                self._drain_if_asked()
            if now - flushed >= FLUSH or not running:
                flushed = now
                self._arm()
                self._metrics.flush(self._service.statistics())
                bridge.copy()

    def _arm(self) -> None:
        """End the process in STUCK seconds, without the interpreter: a call to a Triton that has died never returns.

        Called often, also between messages that take long to make, so that only a single call can be too long.
        """
        now = time.monotonic()
        if now - self._armed >= FLUSH:
            self._armed = now
            faulthandler.dump_traceback_later(STUCK, exit=True)

    def _take(self) -> list[QueuedReply]:
        """All events there are; waits a moment for the first."""
        items: list[QueuedReply] = []
        with contextlib.suppress(queue.Empty):
            items.append(self._events.get(timeout=LOOK))
            while True:
                items.append(self._events.get_nowait())
        return items

    def _merge(self, reply: Reply, event: Event) -> None:
        try:
            if not reply.broken and reply.out.add(event):
                self._service.stop(reply.job, reply.out.text.used)
        except Exception:  # this thread answers all the others, too
            self._break(reply)
        reply.observe(event, self._metrics)

    def _send(self, reply: Reply, event: Event) -> None:
        try:
            response = _response(reply, event)
            self._arm()
            reply.sender.send(response, flags=FINAL if event.reason else 0)
        except Exception:  # as in _merge
            first = not reply.broken
            self._break(reply)
            if event.reason and first:
                return self._send(reply, event)  # an error
        reply.index += 1
        if event.reason:
            reply.ended = True
            self._open.pop(reply, None)

    def _break(self, reply: Reply) -> None:
        """Let a reply end with an error, since a part of it is lost."""
        log.exception("a reply could not be sent; its request is cancelled", extra=reply.job.named)
        reply.broken = True
        self._service.cancel(reply.job)

    def _drain_if_asked(self) -> None:
        if not self._signals or not (self._signals / "drain").exists():
            return
        if self._service.drain(0) and not self._open and self._events.empty():
            (self._signals / "drained").touch()

    def _cancel_abandoned(self) -> None:
        for reply in list(islice(self._open, LOOKED_AT)):
            self._open[reply] = self._open.pop(reply)  # the last, next time
            if reply.sender.is_cancelled():
                self._service.cancel(reply.job)


class Bridge:
    """Copies an engine's metrics into ``family``, Triton's MetricFamily: on one thread, since two abort the server."""

    def __init__(self, metrics: EngineMetrics, family: Any, model: str):
        self._metrics, self._family = metrics, family
        self._series: dict[tuple, Any] = {}
        self._families: dict[str, Any] = {}  # a family that is collected takes its metrics along
        self._copied: dict[tuple, float] = {}
        metrics.observed = deque()
        self._histograms = {
            name: self._make(f"echo_{name}", text, "histogram", {"model_name": model}, buckets=buckets)
            for name, (buckets, text) in HISTOGRAMS.items()
        }

    def copy(self) -> None:
        for metric in self._metrics.collect(TENSORRT_LLM):
            if metric.type == "histogram":
                continue
            for name, labels, value, *_ in metric.samples:
                key = (name, *labels.values())
                series = self._series.get(key) or self._make(name, metric.documentation, metric.type, labels)
                self._series[key], before = series, self._copied.get(key, 0)
                if value != before:
                    series.increment(value - before) if metric.type == "counter" else series.set(value)
                    self._copied[key] = value
        while self._metrics.observed:
            name, value = self._metrics.observed.popleft()
            self._histograms[name].observe(value)

    def _make(self, name: str, text: str, kind: str, labels: dict[str, str], **more: Any) -> Any:
        if name not in self._families:
            family = self._family
            self._families[name] = family(name=name, description=text, kind=getattr(family, kind.upper()))
        return self._families[name].Metric(labels=labels, **more)


def triton_process() -> int:
    """Return Triton's process id: an argument of the stub, since the parent's id changes where Triton has died."""
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    if words[0].endswith(b"triton_python_backend_stub") and words[5].isdigit():
        return int(words[5])
    return os.getppid()


def failed(failure: Failure, coded: bool) -> pb_utils.InferenceResponse:
    """``coded``: the message begins with the code, which a gRPC stream of Triton's does not tell otherwise."""
    code = CODES[failure.kind]
    text = f"{code}: {failure.message}" if coded else failure.message
    number = getattr(pb_utils.TritonError, code.replace("ARGUMENT", "ARG"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, number))


def _response(reply: Reply, event: Event) -> pb_utils.InferenceResponse:
    if reply.broken:
        sentence = "the answer could not be sent; the server's log says why."
        return failed(Failure(kind="failed", message=sentence), reply.coded)
    if event.reason in ERRORS:
        return failed(failure_of(event), reply.coded)
    out = reply.out
    text, token_ids = out.take()
    tensors = [
        _strings("text_output", text),
        pb_utils.Tensor("output_ids", np.array([token_ids], np.int32).reshape(1, -1)),
        _numbers("sequence_index", reply.index, np.int32),
        _numbers("prompt_tokens", len(out.ids), np.int32),
    ]
    if out.in_thought is not None and reply.index == 0:
        tensors.append(_numbers("in_thought", out.in_thought, bool))
    if out.logprobs:
        numbers = np.array([out.logprobs.numbers], np.float32).reshape(1, -1)
        tensors += [
            pb_utils.Tensor("output_log_probs", numbers),
            _numbers("cum_log_probs", out.logprobs.total, np.float32),
            _json("logprobs", map(logprob_object, out.logprobs.clear())),
        ]
    if out.sources:
        tensors.append(_json("token_sources", map(source_object, out.sources.clear())))
    if event.reason:
        tensors += [
            _strings("finish_reason", event.reason),
            _numbers("cached_tokens", event.cached_tokens, np.int32),
            _numbers("completion_tokens", event.completion_tokens, np.int32),
        ]
    if event.reason and reply.statistics:
        accepted, drafted = max(event.completion_tokens - event.verifications, 0), sum(event.drafted)
        tensors += [
            _numbers("acceptance_rate", accepted / drafted if drafted else 0.0, np.float32),
            _numbers("total_accepted_draft_tokens", accepted, np.int32),
            _numbers("total_draft_tokens", drafted, np.int32),
            _numbers("accepted_length", event.completion_tokens / max(event.verifications, 1), np.float32),
            _numbers("time_to_first_token_ms", 1000 * (event.first_token_seconds or 0.0), np.float32),
        ]
    return pb_utils.InferenceResponse(tensors)


def _json(name: str, entries: Iterable[dict[str, Any]]) -> pb_utils.Tensor:
    return _strings(name, json.dumps([*entries], ensure_ascii=False, separators=(",", ":")))


def _strings(name: str, text: str) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([[text.encode()]], object))


def _numbers(name: str, value: float, kind: type) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([[value]], kind))
