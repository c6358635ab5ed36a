"""A listener that keeps what it is told, and a target whose passes wait and fail as a test wants."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Event, Request
from echo_trt.engine.service.job import Job
from echo_trt.engine.service.service import Service
from echo_trt.engine.text.stream import AnswerText
from echo_trt.speculation.pack import ForwardBatch

LONG = SamplingParams(100, ignore_eos=True)
SECONDS = 60  # for what takes a moment on a quiet machine


class Listener:
    """What a request was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pieces: list[str] = []
        self.first, self.done = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.done.is_set(), "told after its end"
        self.events.append(event)
        self.first.set()
        if event.reason:
            self.done.set()

    @property
    def end(self):
        assert self.done.wait(SECONDS)
        return self.events[-1]

    @property
    def text(self) -> str:
        assert self.end
        return "".join(self.pieces)

    @property
    def token_ids(self) -> list[int]:
        assert self.end
        return [token for event in self.events for token in event.token_ids]

    @property
    def token_ids_so_far(self) -> list[int]:
        return [token for event in list(self.events) for token in event.token_ids]

    @property
    def logprobs(self) -> list[float]:
        assert self.end
        return [entry.logprob for event in self.events for entry in event.logprobs]


class Gate:
    """Passes of an engine go through it: all of them, none, or as many as are let."""

    def __init__(self):
        self.changed = threading.Condition()
        self.left, self.waiting = math.inf, False

    def _let(self, passes: float) -> None:
        with self.changed:
            self.left = passes
            self.changed.notify_all()

    def set(self) -> None:
        self._let(math.inf)

    def clear(self) -> None:
        self._let(0)

    def let(self, passes: int) -> None:
        """Let ``passes`` through, and return when one more waits."""
        self._let(passes)
        with self.changed:
            assert self.changed.wait_for(lambda: self.waiting and not self.left, SECONDS)

    def wait(self) -> None:
        with self.changed:
            self.waiting = True
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.left, SECONDS)
            self.waiting = False
            self.left -= 1


class Steered(Engine):
    """The target; ``open`` makes its passes wait, ``fail`` says of each pass whether it fails, with ``early`` at once.

    It overlaps like a device: work of the host is called while a pass waits.
    """

    def __init__(self, engine: Engine):
        self.engine, self.num_blocks = engine, engine.num_blocks
        self.open = Gate()
        self.entered = threading.Event()
        self.fail: Callable[[ForwardBatch], bool] = lambda call: False
        self.passes, self.early = 0, False
        self._meanwhile: Callable[[], None] = lambda: None

    def overlap(self, work: Callable[[], None]) -> bool:
        self._meanwhile = work
        return True

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.passes += 1
        self.entered.set()
        fails = self.fail(call)
        if not (fails and self.early):
            self._meanwhile()
            self.open.wait()
        if fails:
            raise RuntimeError("the engine is unwell")
        return self.engine.run(call, **inputs)

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        self.engine.compact_kv(source, target)


def submit(
    service: Service,
    prompt: list[int],
    params: SamplingParams = LONG,
    tell: Callable | None = None,
    seconds: float | None = None,
    **more,
) -> tuple[Job, Listener]:
    """Ask as a client does that makes the text."""
    job = Job(Request(-1, np.array(prompt, np.int64), params, **more), seconds=seconds)
    listener, text = Listener(), AnswerText(service.llm.tokenizer.backend_tokenizer, params, job.request.generated)

    def told(event: Event) -> None:
        before = text.stopped
        piece, used, _ = text.take(event.token_ids, bool(event.reason) and event.reason != "failed")
        listener.pieces.append(piece)
        event.token_ids, event.logprobs = event.token_ids[:used], event.logprobs[:used]
        if text.stopped and event.reason in ("stop", "length", "deadline"):
            event.reason, event.completion_tokens = "stop", text.used
        elif text.stopped and not before:
            service.stop(job, text.used)
        listener(event)

    job.on_event = tell or told
    service.submit(job)
    return job, listener
