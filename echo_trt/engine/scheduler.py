"""The scheduler: waiting requests, and requests that run in a slot."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.kv_blocks import blocks_for
from echo_trt.engine.params import MAX_STOP_TOKENS, Counters, SamplingParams, too_long
from echo_trt.engine.request import Request
from echo_trt.errors import TooLong, UserError
from echo_trt.speculation.pacer import Latency, Pacer


class Scheduler:
    """Requests join and leave at any iteration; where KV blocks are short, the least urgent one waits again."""

    def __init__(self, batch: InputBatch, eos: tuple[int, ...], counters: Counters, pacer: Pacer):
        """Begin without requests. ``eos``: token ids that end a text."""
        self._batch, self._counters, self._pacer = batch, counters, pacer
        self.eos = eos
        self.forget: Callable[[int], None] = lambda slot: None  # is called with a slot that its request has left
        self.waiting: deque[Request] = deque()
        self._request_in = np.full(batch.count, None, object)
        self.admissions = 0  # of requests so far, a preempted one's again

    @property
    def running(self) -> int:
        return int(self._batch.active.sum())

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or bool(self._batch.active.any())

    def running_in(self, slots: np.ndarray) -> np.ndarray:
        """Return the requests in ``slots`` int64 [B]: object [B]."""
        requests: np.ndarray = self._request_in[slots]
        return requests

    def add(self, request: Request) -> None:
        self.check(request)
        request.submitted = request.submitted or time.monotonic()
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Refuse a prompt that leaves no room for an answer, and too many stop tokens. Any thread may ask."""
        free_tokens = self._batch.context - len(request.prompt) - len(request.generated)
        if len(request.prompt) == 0:
            raise UserError("the prompt is empty; give at least one token.", "prompt")
        if free_tokens < 1:
            raise TooLong(
                f"the prompt has {len(request.prompt)} tokens, but this model's maximum context length is "
                f"{self._batch.context} tokens for prompt and answer; shorten it, or build a bundle with a "
                "larger --max-model-len.",
                "prompt",
            )
        batch = self._batch
        needed = blocks_for(min(len(request.prompt) + request.params.max_tokens, batch.context) + batch.reserve)
        if needed > batch.blocks.count:  # a part of a pool: it would wait for ever
            raise UserError(
                f"the request may need {needed} KV blocks, but there are {batch.blocks.count}; lower its "
                "max_tokens, or raise limits.kv_blocks in the recipe and build again."
            )
        if (predicted := len(request.params.prediction_ids)) > batch.context:
            raise UserError(too_long(f"{predicted} tokens", batch.context), "prediction")
        requested = len(request.params.stop_token_ids)
        maximum = MAX_STOP_TOKENS - len(self._stop_tokens(request.params)) + requested
        if requested > maximum:
            raise UserError(f"stop_token_ids has {requested} ids; give at most {maximum}.", "stop_token_ids")

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is; its KV blocks are free at once."""
        if request.slot >= 0:
            self.leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def preempt_all(self) -> list[Request]:
        """Take all requests out, oldest first. Added again, a request goes on from its text so far."""
        running = [self._request_in[slot] for slot in self._batch.oldest_first(self._batch.active)]
        for request in running:
            self.leave(request)
        requests = [*running, *self.waiting]
        self.waiting.clear()
        return requests

    def admit(self) -> None:
        """Admit waiting requests, urgent and old ones first, while there is a slot, and room for the text so far."""
        batch = self._batch
        while self.waiting and not batch.active.all():
            request = min(self.waiting, key=lambda request: request.priority)
            text = np.concatenate((request.prompt, np.asarray(request.generated, np.int64)))
            slot = int(np.flatnonzero(~batch.active)[0])
            finds = request.params.prompt_logprobs is None
            if not batch.open(slot, text, request.keys, finds, request.sender.salt):
                return
            self.waiting.remove(request)
            self._counters.asked_tokens += len(text) * (not request.probe)
            self._counters.cached_tokens += int(batch.committed[slot])
            self._enter(request, slot)

    def leave(self, request: Request) -> None:
        """Take a request out of its slot; it keeps its text."""
        batch, slot = self._batch, request.slot
        request.verifications = int(batch.record["verifications"][slot])
        if request.cached_tokens is None:  # text that it finds after a preemption is its own
            request.cached_tokens = int(batch.blocks.found[slot])
        request.generated = batch.tokens[slot, batch.prompt_length[slot] : batch.length[slot]].tolist()
        request.grammar = batch.grammar[slot]
        request.speculation.saved = tuple(batch.record["saved"][slot].tolist())
        request.started = self._pacer.end(slot)
        batch.release(slot)
        self.forget(slot)
        self._request_in[slot], request.slot = None, -1

    def preempt_least_urgent(self) -> None:
        """Preempt a request: its text is kept and computed again later, nothing is emitted twice.

        It is the youngest one of those with the highest priority number.
        """
        running = self._request_in[self._batch.oldest_first(self._batch.active)]
        request = max(reversed(running), key=lambda request: request.priority)
        self.leave(request)
        self.waiting.appendleft(request)
        self._counters.preemptions += 1

    def _enter(self, request: Request, slot: int) -> None:
        """Put a request into a slot that holds its text so far (``InputBatch.open``)."""
        batch, params, stops = self._batch, request.params, self._stop_tokens(request.params)
        batch.prompt_length[slot] = len(request.prompt)
        batch.limit[slot] = min(len(request.prompt) + params.max_tokens, batch.context)
        batch.set_params(slot, params)
        batch.grammar[slot], request.grammar = request.grammar, None  # the only reference: older states are let go
        if len(request.prompt_logprobs) == len(request.prompt) - 1:
            batch.sampling["prompt_logprobs"][slot] = -1  # complete, and perhaps read by another thread now
        else:
            request.prompt_logprobs.clear()  # they are computed again, with the prompt
        batch.stop_tokens[slot] = -1
        batch.stop_tokens[slot, : len(stops)] = stops
        batch.record[slot] = request.verifications, request.speculation.saved, not request.probe
        batch.known["calls"][slot] = request.calls
        latency, behind_first = Latency.of(params.latency), max(len(request.generated) - 1, 0)
        self._pacer.begin(slot, latency, request.submitted, request.started, behind_first, request.sender.tenant)
        batch.admitted[slot], self.admissions = self.admissions, self.admissions + 1
        batch.active[slot] = True
        self._request_in[slot], request.slot = request, slot

    def _stop_tokens(self, params: SamplingParams) -> list[int]:
        endless = params.ignore_eos and params.structured is None  # a grammar's last token is an end
        return [*(() if endless else self.eos), *params.stop_token_ids]
