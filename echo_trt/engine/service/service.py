"""The engine service: one thread owns the engine core and answers all requests; any thread may submit and cancel.

Every accepted request ends with exactly one output that has an ``end``. Listeners are called on the engine's thread, in
order, and must not block. Where a device computes, they are called while it computes the next iteration.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from itertools import count

from echo_trt.engine.core import Emitted
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import check_answer_logprobs, check_prompt_logprobs
from echo_trt.engine.request import FIRST, Event, Request
from echo_trt.engine.service.fault_isolation import FaultIsolation
from echo_trt.engine.service.grammars import GrammarQueue
from echo_trt.engine.service.job import FairQueue, Job, Overloaded
from echo_trt.engine.service.metrics import KEPT, Statistics
from echo_trt.engine.sources.predictions import accepted
from echo_trt.engine.stored_prefixes import StoredPrefixes
from echo_trt.errors import described
from echo_trt.speculation.sources import SOURCES

log = logging.getLogger(__name__)

MANY = 8  # running requests from which on a pass hides the reporting; larger: sooner reports, longer iterations


class Service:
    """Answers requests with ``llm``, which nobody else may use. ``queue``: how many requests may wait for a slot."""

    def __init__(self, llm: LLM, queue: int = 256, prefixes: StoredPrefixes | None = None):
        """``prefixes``: the prefix cache's store, which is closed with the service."""
        self._prefixes = prefixes
        self.llm, self.loop, self._max_waiting = llm, llm.loop, queue
        # Guards the attributes up to the blank line, but for reads of ``_open`` by the engine's thread, which alone
        # removes from it.
        self._changed = threading.Condition()
        self._open: dict[Request, Job] = {}
        self._probes: dict[Request, Job] = {}  # open jobs that only ask if the engine works
        self._pending = FairQueue(self.loop.batch.count)
        # Jobs that end before the next iteration, with reasons and messages, and what is left of each that a stop
        # string has ended.
        self._ending: list[tuple[Job, str, str]] = []
        self._stopped: dict[Job, int] = {}
        self._draining = self._closed = self._dead = False

        # The engine thread's own.
        self._isolation = FaultIsolation()  # requests that were running when the engine failed
        self._ended: Counter[str] = Counter()
        self._of_class: Counter[str] = Counter()  # finished requests by class of latency targets
        self._kept: Counter[tuple[str, str]] = Counter()  # those that were kept, by class and target
        self._engine_failures = 0
        # Tokens to tell, and when the engine had them
        self._due: deque[tuple[Job, list[int], float]] = deque()
        self._overlaps = self.loop.target.overlap(self._report_due)

        self._epoch = count()
        self._grammars = GrammarQueue(llm, self._changed, self._have_grammar)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for any thread --------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job; its events begin at once. After ``job.seconds`` the answer ends with the reason deadline.

        What its request has ``generated`` are the answer's first tokens, which another engine has emitted. The answer
        goes on behind them as if this engine had emitted them: they count in ``max_tokens``, ``min_tokens``, penalties
        and ``completion_tokens``. No event brings them again.

        A grammar is compiled while the job waits; one that cannot be used ends it with the reason invalid.

        A probe, of one token and the priority FIRST, is taken however long the queue is, ends with the first iteration
        that began after it came, and is counted nowhere. Raises UserError for a wrong prompt, Overloaded while no
        request is taken.
        """
        request, params = job.request, job.request.params
        request.id, request.submitted = next(self._epoch), time.monotonic()
        if params.prompt_logprobs is not None:
            check_prompt_logprobs("prompt_logprobs", len(request.prompt), 1, params.prompt_logprobs)
        tokens = min(params.max_tokens, self.loop.batch.context - len(request.prompt))
        check_answer_logprobs("max_tokens", params.max_tokens, tokens, 1, params.entries)
        grammar = self.llm.grammars.to_compile(params.structured) if params.structured is not None else None
        self.llm.prepare(request, compiled=grammar is None)
        self.loop.scheduler.check(request)
        job.reported = len(request.generated)
        job.deadline = None if job.seconds is None else request.submitted + job.seconds
        with self._changed:
            if self._draining:
                raise Overloaded("away", "the server is shutting down; send the request to another one.")
            # Many requests may arrive while all slots are free. Probes and requests that wait for a grammar take no
            # slot.
            waiting = len(self._grammars)
            ahead = waiting if grammar else len(self._open) - len(self._probes) - waiting
            if self._is_full(job, ahead):
                sentence = f"the queue is full, {self._max_waiting} requests wait; try again in a second."
                raise Overloaded("queue_full", sentence, 1)
            if grammar:
                self._grammars.add(grammar, job)
            else:
                self._pending.add(job)
            self._open[request] = job
            if request.probe:
                self._probes[request] = job
            self._changed.notify_all()

    def _is_full(self, job: Job, ahead: int) -> bool:
        """Say whether a job finds no place behind those ``ahead``; a tenant with less than its share does."""
        maximum = self.loop.batch.count + self._max_waiting
        if ahead < maximum or job.request.probe:
            return False
        held = Counter(other.tenant for other in self._open.values())
        return held[job.tenant] * len(held.keys() | {job.tenant}) >= maximum

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._dead

    def cancel(self, job: Job) -> None:
        """End a job before the next iteration; nothing happens if it has ended."""
        with self._changed:
            if job.request in self._open:
                self._ending.append((job, "cancelled", ""))
                self._changed.notify_all()

    def stop(self, job: Job, tokens: int) -> None:
        """End a job before the next iteration, since its first ``tokens`` have completed a stop string.

        Whoever makes its text sees that. What was emitted behind them was never said.
        """
        with self._changed:
            if job.request in self._open:
                self._stopped[job] = tokens
                self._ending.append((job, "stop", ""))
                self._changed.notify_all()

    def _have_grammar(self, job: Job, failure: str) -> None:
        """Queue a job that has its grammar, or end it with the ``failure``; the lock is held."""
        if failure:
            self._ending.append((job, "invalid", failure))
        else:
            self._pending.add(job)
        self._changed.notify_all()

    def statistics(self) -> Statistics:
        """Return the current figures. Any thread may ask at any time."""
        loop, batch, planner, of_class = self.loop, self.loop.batch, self.loop.planner, list(self._of_class.items())
        return Statistics(
            queued=len(self._grammars) + len(self._pending) + len(loop.scheduler.waiting),
            running=sum(request.slot >= 0 and not request.probe for request in list(self._open)),
            slots=batch.count,
            blocks=batch.blocks.count,
            blocks_used=batch.blocks.used,
            blocks_cached=batch.blocks.cached,
            policy=planner.name,
            budget=planner.budget,
            counters=loop.counters.copy(),
            drafts=planner.totals(),
            ended=dict(self._ended),
            engine_failures=self._engine_failures,
            given_up=self._isolation.given_up,
            queued_tokens=sum(len(job.request.prompt) for job in self._pending),
            gain=planner.gain(),
            saved=dict(zip(SOURCES, loop.bill.saved.tolist(), strict=True)),
            saved_error=loop.bill.error,
            latency={name: (count, {what: self._kept[name, what] for what in KEPT}) for name, count in of_class},
        )

    def drain(self, seconds: float | None = None) -> bool:
        """Take no more requests and wait until those that were taken have ended; False if that takes longer."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._open, seconds)

    def close(self, seconds: float | None = None) -> None:
        """Drain for so long, cancel what is left, and stop."""
        self.drain(seconds)
        with self._changed:
            self._ending += [(job, "cancelled", "") for job in self._open.values()]
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._grammars.close()
        self.loop.target.overlap(lambda: None)  # breaks a reference cycle that would keep the engine's memory
        if self._prefixes:
            self._prefixes.close()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._end_early()
                self._feed()
                self._iterate()
        except Exception:  # any error must end all requests: their clients wait
            log.exception("the engine's thread has died; its requests fail")
            self._dead = True
            self._fail_all("the engine's thread has died; the server must be restarted.")

    def _wait(self) -> bool:
        """Until there is something to do; False once the service is closed.

        There is nothing to do for jobs that wait for their grammars until a deadline of theirs.
        """
        with self._changed:
            while len(self._open) == len(self._grammars) and not (self._ending or self._closed):
                deadlines = [job.deadline for job in self._open.values() if job.deadline is not None]
                seconds = min(deadlines) - time.monotonic() if deadlines else None
                if seconds is not None and seconds <= 0:
                    break
                self._changed.wait(seconds)
            return bool(self._open) or not self._closed

    def _end_early(self) -> None:
        """End what was cancelled, and what is late."""
        now = time.monotonic()
        with self._changed:
            ending, self._ending = self._ending, []
            late = [job for job in self._open.values() if job.deadline is not None and job.deadline <= now]
        for job, reason, message in [*ending, *((job, "deadline", "") for job in late)]:
            self._end(job, reason, message)

    def _feed(self) -> None:
        """Fill free slots with waiting requests, or run a suspect alone."""
        loop = self.loop
        if self._isolation.on_trial:
            return
        if self._isolation.waiting and (suspect := self._isolation.next_trial()):
            loop.scheduler.add(suspect.request)
            return
        while len(loop.scheduler.waiting) + loop.scheduler.running < loop.batch.count:
            with self._changed:
                taken = [request for request in self._open if request.slot >= 0] + [*loop.scheduler.waiting]
                job = self._pending.pop(Counter(request.sender.tenant for request in taken))
            if job is None:
                return
            job.taken = job.taken or time.monotonic()
            loop.scheduler.add(job.request)

    def _iterate(self) -> None:
        counters = self.loop.counters
        before = counters.iterations
        with self._changed:
            probes = list(self._probes.values())
        try:
            emitted = self.loop.step()  # an engine that overlaps has the due tokens told meanwhile
        except Exception as error:  # _recover logs it
            self._recover(error)
            return
        self._report_due()
        now = time.monotonic()
        for request, _ in emitted:
            if job := self._open.get(request):
                job.emitted = now
        self._hand_over(emitted, now)
        if counters.iterations > before:
            for job in probes:
                self._end(job, "busy")  # no effect on a probe that has had its token
        if emitted and self._isolation.on_trial and (cleared := self._isolation.cleared()):
            self.loop.scheduler.preempt_all()
            self._requeue([cleared])

    def _hand_over(self, emitted: Emitted, now: float) -> None:
        """Report an iteration's tokens now, or during the next pass, where reporting takes no extra time."""
        many = len(emitted) >= MANY
        waits = self._overlaps and self.loop.scheduler.busy and self._isolation.on_trial is None and many
        for request, tokens in emitted:
            if (job := self._open.get(request)) is None:
                continue
            self._due.append((job, tokens, now))
            if not waits:
                self._report(*self._due.pop())

    def _report_due(self) -> None:
        while self._due:
            self._report(*self._due.popleft())

    def _report(self, job: Job, tokens: list[int], when: float) -> None:
        """Tell a request's new tokens, and its end where they bring it."""
        job.first_token, event, request = job.first_token or when, job.take(tokens), job.request
        event.time = when
        if request.finish_reason:
            self._close_job(job, event, request.finish_reason, request.failure)
        elif event.token_ids:
            self._send(job, event)

    def _end(self, job: Job, reason: str, message: str = "") -> None:
        """End a job between two iterations, wherever it is; its KV blocks are free at once."""
        self._report_due()
        if job.request not in self._open:
            return
        self.loop.scheduler.cancel(job.request)
        with self._changed:
            self._pending.remove(job)
            self._grammars.remove(job)
        self._isolation.dismiss(job)
        job.request.finish_reason = reason
        self._close_job(job, Event(time=time.monotonic()), reason, message)

    def _close_job(self, job: Job, event: Event, reason: str, message: str = "") -> None:
        request = job.request
        event.reason, event.message, event.prompt_tokens = reason, message, len(request.prompt)
        job.reported = min(job.reported, self._stopped.pop(job, job.reported))
        event.cached_tokens, event.completion_tokens = request.cached_tokens or 0, job.reported
        event.verifications = request.verifications
        drafts, saved = request.speculation.drafts, request.speculation.saved
        event.drafted, event.accepted = ([each[index] for each in drafts] for index in range(2))
        event.saved, event.saved_error = (None, 0.0) if math.isnan(saved[0]) else saved
        event.predicted = accepted(request.params.prediction_ids, request.generated[: job.reported])
        event.queue_seconds = job.taken and job.taken - request.submitted
        event.first_token_seconds = job.first_token and job.first_token - request.submitted
        if not request.probe:
            self._ended[reason] += 1
        if reason in ("stop", "length", "deadline"):
            self._compare(job)
        self._send(job, event)
        with self._changed:
            del self._open[request]
            self._probes.pop(request, None)
            self._changed.notify_all()

    def _compare(self, job: Job) -> None:
        """Compare a finished job's times with its targets."""
        if job.first_token is None or job.emitted is None or job.request.priority == FIRST:
            return
        ttft = job.first_token - job.request.submitted
        tpot = (job.emitted - job.first_token) / max(job.reported - 1, 1)
        if name := job.latency.name:
            self._of_class[name] += 1
            kept = (job.latency.kept(ttft, 0.0), job.latency.kept(0.0, tpot), job.latency.kept(ttft, tpot))
            self._kept.update((name, what) for what, each in zip(KEPT, kept, strict=True) if each)

    def _send(self, job: Job, event: Event) -> None:
        if not job.begun:
            event.prompt_logprobs, job.begun = job.request.prompt_logprobs, True
        try:
            job.on_event(event)
        except Exception:  # a listener's trouble is its own request's alone
            log.exception("the listener of a request failed; the request is cancelled", extra=job.named)
            if not event.reason:
                self.cancel(job)

    # -- when the engine fails -------------------------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """Empty the loop. What was running is tried one by one (``FaultIsolation``); what waited there waits here."""
        log.exception("the engine failed; requests that were running are tried one by one")
        self._engine_failures += 1
        with self._changed:  # others submit meanwhile
            running = [job for job in self._open.values() if job.request.slot >= 0]
            known = {*self._pending, *self._isolation.waiting}
            inside = [job for job in self._open.values() if job not in known and job not in self._grammars]
        self.loop.scheduler.preempt_all()
        self.loop.batch.blocks.forget_cached()  # nobody knows what the engine has left in its pool
        self._due.clear()  # those tokens are among the untold ones
        for job in inside:
            unreported = job.request.generated[job.reported :]  # the iteration may have failed after it had its tokens
            if unreported or job.request.finish_reason:
                self._report(job, unreported, time.monotonic())
        unended = [job for job in running if job.request in self._open]
        alone = len(running) == 1
        if faulty := self._isolation.engine_failed(unended, alone):
            how = "that ran alone" if alone else "beside others, again and again"
            log.error("the engine fails on a request %s; it is given up", how, extra=faulty.named)
            self._end(faulty, "failed", f"the engine fails on this request ({described(error)}).")
        self._requeue([job for job in inside if job not in running])

    def _requeue(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                if job.request in self._open:
                    self._pending.add(job)

    def _fail_all(self, message: str) -> None:
        with self._changed:
            self._draining = True
        try:
            self._report_due()  # answers that are complete are no failures
        except Exception:  # the jobs below must end, too
            log.exception("the tokens of the last iteration could not be told")
        for job in list(self._open.values()):
            try:
                self._close_job(job, Event(time=time.monotonic()), "failed", message)
            except Exception:  # the others must end, too
                log.exception("a request could not be ended", extra=job.named)
