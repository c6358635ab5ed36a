"""Replies on their way to Triton: one thread sends them all, asks who has gone, and keeps the metrics."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from echo_trt.serving.job import ERRORS, End, Event, Job
from echo_trt.serving.logprobs import Outgoing
from echo_trt.serving.metrics import Metrics
from echo_trt.serving.protocol import FIRST
from echo_trt.serving.request import Ask
from echo_trt.serving.service import Service
from echo_trt.serving.snapshots import Onlooker
from echo_trt.serving.sources import OutgoingSources

log = logging.getLogger(__name__)

TRITONS_NAMES = {"INVALID_ARGUMENT": "INVALID_ARG"}  # of gRPC's codes, where they differ
#: Seconds between two looks at whether clients are still there, between two updates of the metrics; too long a call.
LOOK, FLUSH, STUCK = 0.05, 0.25, 15.0
#: Seconds between two snapshots for onlookers, and where nothing happens; how long one may look before it asks again.
SNAPSHOT, IDLE_SNAPSHOT, WATCH = 0.2, 1.0, 10.0
MOST_ONLOOKERS = 8  # clients that get snapshots; a gateway is one of them, with all its viewers
LOOKED_AT = 16  # clients checked at once, in turn; larger: one that leaves is noticed sooner, at the engine's cost
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@dataclass(eq=False)
class Reply:
    """An open request, and what of its answer has not been sent yet."""

    sender: Any
    ask: Ask
    arrived: float
    id: str = ""  # the client's own
    coded: bool = False  # an error's message begins with its code
    logprobs: Outgoing | None = None  # where asked for
    sources: OutgoingSources | None = None  # where asked for
    job: Job | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    index: int = 0
    last: float | None = None  # time of the last event
    ended: bool = False
    broken: bool = False  # a part of it was lost, so it ends with an error

    def __post_init__(self) -> None:
        self.text = self.ask.echoed

    def take(self, event: Event) -> None:
        """Add an event to what has not been sent."""
        if self.broken:
            return
        self.text += event.text
        self.ids += event.token_ids
        if self.logprobs and self.last is None and self.ask.params.prompt_logprobs is not None:
            while self.job is None:  # its first event may come before ``submit`` has returned
                time.sleep(0.001)
            self.logprobs.begin(self.ask.prompt, self.job.request.prompt_logprobs)
        if self.logprobs:
            self.logprobs.take(event.logprobs, event.offsets)
        if self.sources:
            self.sources.take(event.sources, event.offsets)


@dataclass(eq=False)
class Watch:
    """A client that gets snapshots.

    id   of its request, by which it can end it
    end  time.monotonic() at which it has to ask again
    """

    sender: Any
    id: str
    end: float


#: An event of a reply, None with it where the reply begins; an onlooker; the id of requests to stop; None: close.
Item = tuple[Reply, Event | None] | Watch | str | None


class Replies:
    """Any thread may ``begin`` a reply and ``put`` its events, which may come before it begins.

    Once there is a file ``drain`` in the folder ``signals``, nothing new is taken; ``drained`` appears there when the
    last reply has been sent. (A Triton that is told to stop refuses new requests itself, but may abort over it.)
    """

    def __init__(self, service: Service, model: str, signals: Path | None = None):
        """``model``: its name in metrics. ``signals``: see above."""
        self._service, self._model, self._signals = service, model, signals
        self._events: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._open: dict[Reply, Job] = {}  # in the order in which their clients are looked at
        self._refused: Counter[str] = Counter()
        self._watches: dict[Watch, None] = {}
        self._armed = float("-inf")
        self._onlooker = Onlooker(service)
        self._thread = threading.Thread(target=self._run, name="replies", daemon=True)
        self._thread.start()

    def begin(self, reply: Reply) -> None:
        """Watch whether its client is still there; ``reply.job`` is known."""
        self._events.put((reply, None))

    def put(self, reply: Reply, event: Event) -> None:
        self._events.put((reply, event))

    def stop(self, id: str) -> None:
        """Cancel the open requests that their clients have given this id."""
        self._events.put(id)

    def watch(self, sender: Any, id: str) -> None:
        """Send snapshots to a client for WATCH seconds."""
        self._events.put(Watch(sender, id, time.monotonic() + WATCH))

    def refused(self, outcome: str) -> None:
        """Count a request that the service never took."""
        self._refused[outcome] += 1

    def close(self) -> None:
        """Send what there is, and stop."""
        self._events.put(None)
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        metrics = Metrics(pb_utils.MetricFamily, self._model)
        looked = flushed = told = time.monotonic()
        running, server = True, triton_process()
        while running:
            if os.getppid() != server:  # Triton was killed, and would leave this process behind
                os._exit(1)
            changed: dict[Reply, Event] = {}
            for item in self._take():
                if item is None:
                    running = False
                elif isinstance(item, str):
                    self._stop(item)
                elif isinstance(item, Watch):
                    self._watches[item] = None
                else:
                    reply, event = item
                    if event is not None:
                        self._arm()
                        self._merge(reply, event, metrics)
                        changed[reply] = event
                    elif reply.job and not reply.ended:
                        self._open[reply] = reply.job
            for reply, event in changed.items():
                if event.end or (reply.ask.stream and reply.text and not reply.broken):
                    self._send(reply, event.end)
            now = time.monotonic()
            if self._watches or self._onlooker.on:
                told = self._tell_onlookers(told, now)
            if now - looked >= LOOK:
                looked = now
                self._cancel_abandoned()
                self._drain_if_asked()
            if now - flushed >= FLUSH or not running:
                flushed = now
                self._arm()
                metrics.flush(self._service.statistics(), dict(self._refused))

    def _arm(self) -> None:
        """End the process in STUCK seconds, without the interpreter: a call to a Triton that has died never returns.

        Called often, also between messages that take long to make, so that only a single call can be too long.
        """
        now = time.monotonic()
        if now - self._armed >= FLUSH:
            self._armed = now
            faulthandler.dump_traceback_later(STUCK, exit=True)

    def _take(self) -> list[Item]:
        """All events there are; waits a moment for the first."""
        items: list[Item] = []
        with contextlib.suppress(queue.Empty):
            items.append(self._events.get(timeout=LOOK))
            while True:
                items.append(self._events.get_nowait())
        return items

    def _merge(self, reply: Reply, event: Event, metrics: Metrics) -> None:
        """Several events of one reply become one message."""
        try:
            reply.take(event)
        except Exception:  # this thread answers all the others, too
            self._break(reply)
        client = reply.ask.priority != FIRST  # not a probe, whose times would hide the clients' on a quiet server
        if client and reply.last is not None and event.token_ids:
            metrics.observe("inter_token", (event.time - reply.last) / len(event.token_ids))
        if event.token_ids:
            reply.last = event.time
        if client and event.end and event.end.reason != "invalid":
            metrics.ended(event.end)
            metrics.observe("request", event.time - reply.arrived)

    def _send(self, reply: Reply, end: End | None) -> None:
        try:
            response = _response(reply, end)
            self._arm()
            reply.sender.send(response, flags=FINAL if end else 0)
        except Exception:  # as in _merge
            first = not reply.broken
            self._break(reply)
            if end and first:
                return self._send(reply, end)  # an error
        reply.text, reply.ids = "", []
        reply.index += 1
        if end:
            reply.ended = True
            self._open.pop(reply, None)

    def _break(self, reply: Reply) -> None:
        """Let a reply end with an error, since a part of it is lost."""
        log.exception("a reply could not be sent; its request is cancelled")
        reply.broken = True
        if reply.job:
            self._service.cancel(reply.job)

    def _tell_onlookers(self, told: float, now: float) -> float:
        """Send a snapshot to all onlookers if one is due; returns the time of the latest snapshot. Never raises.

        told, now  time.monotonic() of the latest snapshot, and of this call
        """
        if now - told < (SNAPSHOT if self._onlooker.news else IDLE_SNAPSHOT):
            return told
        try:
            self._send_snapshots(now)
        except Exception:  # a page that cannot be drawn must not end answers
            log.exception("a snapshot could not be made; its onlookers are sent away")
            self._onlooker.switch(False)
            for watch in list(self._watches):
                self._let_go(watch)
        return now

    def _send_snapshots(self, now: float) -> None:
        """Send a snapshot to all onlookers, the last one to an onlooker whose time is over.

        The loop is watched until the next call after the last onlooker has left, so that an onlooker that asks again at
        once misses no iteration.
        """
        if self._onlooker.on != bool(self._watches):
            self._onlooker.switch(not self._onlooker.on)
        if not self._watches:
            return
        snapshot = self._onlooker.snapshot()
        for number, watch in enumerate(list(self._watches)):
            if watch.sender.is_cancelled():
                self._let_go(watch)
            elif now >= watch.end or number >= MOST_ONLOOKERS:
                self._let_go(watch, snapshot)
            else:
                self._send_snapshot(watch, snapshot)

    def _let_go(self, watch: Watch, snapshot: str = "") -> None:
        self._send_snapshot(watch, snapshot, FINAL)
        self._watches.pop(watch, None)

    def _send_snapshot(self, watch: Watch, snapshot: str, flags: int = 0) -> None:
        tensors = [_strings("snapshot", snapshot)]
        if flags:
            tensors.append(_strings("finish_reason", "stop"))
        try:
            watch.sender.send(pb_utils.InferenceResponse(tensors), flags=flags)
        except Exception:  # as in _merge
            log.exception("a snapshot could not be sent")
            self._watches.pop(watch, None)

    def _drain_if_asked(self) -> None:
        if not self._signals or not (self._signals / "drain").exists():
            return
        for watch in list(self._watches):
            self._let_go(watch)
        if self._service.drain(0) and not self._open and self._events.empty():
            (self._signals / "drained").touch()

    def _stop(self, id: str) -> None:
        for watch in [each for each in self._watches if each.id == id]:
            self._let_go(watch)
        for reply, job in self._open.items():
            if reply.id == id:
                self._service.cancel(job)

    def _cancel_abandoned(self) -> None:
        for reply in list(islice(self._open, LOOKED_AT)):
            self._open[reply] = job = self._open.pop(reply)  # the last, next time
            if reply.sender.is_cancelled():
                self._service.cancel(job)


def triton_process() -> int:
    """Triton's process id. Its stub is told it, since Triton may have died before the bundle was loaded."""
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    if words[0].endswith(b"triton_python_backend_stub") and words[5].isdigit():
        return int(words[5])
    return os.getppid()


def failed(code: str, message: str, coded: bool) -> pb_utils.InferenceResponse:
    """``coded``: the message begins with the code, which a gRPC stream of Triton's does not tell otherwise."""
    text = f"{code}: {message}" if coded else message
    number = getattr(pb_utils.TritonError, TRITONS_NAMES.get(code, code))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, number))


def described(text: str) -> pb_utils.InferenceResponse:
    """The response to a question what the model is; ``text`` is JSON."""
    return pb_utils.InferenceResponse([_strings("description", text)])


def tokenized(ids: list[int], text: str | None) -> pb_utils.InferenceResponse:
    """The response to a question for tokens, or for their text where ``text`` is not None."""
    if text is not None:
        return pb_utils.InferenceResponse([_strings("text_output", text)])
    return pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", np.array([ids], np.int32).reshape(1, -1))])


def _response(reply: Reply, end: End | None) -> pb_utils.InferenceResponse:
    if reply.broken:
        return failed("INTERNAL", "the answer could not be sent; the server's log says why.", reply.coded)
    if end and end.reason in ERRORS:
        return failed(ERRORS[end.reason], end.message or "the request was cancelled.", reply.coded)
    tensors = [
        _strings("text_output", reply.text),
        pb_utils.Tensor("output_ids", np.array([reply.ids], np.int32).reshape(1, -1)),
        _numbers("sequence_index", reply.index, np.int32),
        _numbers("prompt_tokens", len(reply.ask.prompt), np.int32),
    ]
    if reply.ask.in_thought is not None and reply.index == 0:
        tensors.append(_numbers("in_thought", reply.ask.in_thought, bool))
    if reply.logprobs:
        numbers = np.array([reply.logprobs.numbers], np.float32).reshape(1, -1)
        tensors += [
            pb_utils.Tensor("output_log_probs", numbers),
            _numbers("cum_log_probs", reply.logprobs.total, np.float32),
            _strings("logprobs", reply.logprobs.clear()),
        ]
    if reply.sources:
        tensors.append(_strings("token_sources", reply.sources.clear()))
    if end:
        tensors += [
            _strings("finish_reason", end.reason),
            _numbers("cached_tokens", end.cached_tokens, np.int32),
            _numbers("completion_tokens", end.completion_tokens, np.int32),
        ]
    if end and reply.ask.statistics:
        accepted = max(end.completion_tokens - end.verifications, 0)
        tensors += [
            _numbers("acceptance_rate", accepted / end.drafted if end.drafted else 0.0, np.float32),
            _numbers("total_accepted_draft_tokens", accepted, np.int32),
            _numbers("total_draft_tokens", end.drafted, np.int32),
            _numbers("accepted_length", end.completion_tokens / max(end.verifications, 1), np.float32),
            _numbers("time_to_first_token_ms", 1000 * (end.first_token_seconds or 0.0), np.float32),
        ]
    return pb_utils.InferenceResponse(tensors)


def _strings(name: str, text: str) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([[text.encode()]], object))


def _numbers(name: str, value: float, kind: type) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([[value]], kind))
