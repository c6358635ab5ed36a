"""The engine service: one thread owns the loop and answers all requests; any thread may submit and cancel.

Each request that was taken ends with exactly one event that has an ``end``. Events are told on the engine's thread, in
order, so a listener must not block. Where a device computes, they are told while it computes the next iteration.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import count

from echo_trt.backends.base import overlap
from echo_trt.runtime.answer import Answer, Said
from echo_trt.runtime.llm import LLM
from echo_trt.runtime.params import SamplingParams, check_prompt_logprobs
from echo_trt.runtime.request import Emission, Request
from echo_trt.serving.grammars import GrammarQueue
from echo_trt.serving.job import End, Event, Job, Overloaded
from echo_trt.serving.statistics import Statistics
from echo_trt.serving.suspects import Suspects

log = logging.getLogger(__name__)

MANY = 8  # running requests from which on tokens wait for the next pass; larger: sooner told, iterations take longer
NOTHING = Said("", [])


class Service:
    """Answers requests with ``llm``, which is its own from now on. ``queue``: how many may wait for a place."""

    def __init__(self, llm: LLM, queue: int = 256):
        self.llm, self.loop, self._most_waiting = llm, llm.loop, queue
        # Guards the attributes up to the blank line, but for reads of ``_open`` by the engine's thread, which alone
        # removes from it.
        self._changed = threading.Condition()
        self._open: dict[Request, Job] = {}
        self._probes: dict[Request, Job] = {}  # open jobs that only ask if the engine works
        self._pending: list[Job] = []  # a heap
        self._ending: list[tuple[Job, str, str]] = []  # jobs that end before the next iteration, reasons and messages
        self._draining = self._closed = self._dead = False

        # The engine thread's own.
        self._suspects = Suspects()  # requests that were running when the engine failed
        self._ended: Counter[str] = Counter()
        self._engine_failures = 0
        self._due: deque[tuple[Job, Sequence[int], float]] = deque()  # tokens to tell, and when the engine had them
        self._broken: dict[Job, str] = {}  # jobs whose text cannot be made, and why; to be ended
        self._overlaps = overlap(self.loop.target, self._tell_due)

        self._serial = count()
        self._grammars = GrammarQueue(llm, self._changed, self._have_grammar)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for any thread --------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        priority: int = 0,
        seconds: float | None = None,
        said: Sequence[int] = (),
    ) -> Job:
        """Queue a prompt; its events begin at once. After ``seconds`` it ends as it is, with the reason deadline.

        ``said``: the answer's first tokens, which another engine has emitted. The answer goes on behind them as if this
        engine had emitted them: they count in ``max_tokens``, ``min_tokens``, penalties and ``End``. No event brings
        them again.

        A grammar is compiled while the job waits; one that cannot be used ends it with the reason invalid.

        A probe, of one token and the priority FIRST, is taken however long the queue is, and ends with the first
        iteration that began after it came. Raises UserError for a prompt that cannot be answered, Overloaded while no
        request is taken.
        """
        serial, now = next(self._serial), time.monotonic()
        if params.prompt_logprobs is not None:
            check_prompt_logprobs("prompt_logprobs", len(prompt), 1, params.prompt_logprobs)
        grammar = self.llm.grammars.to_compile(params.structured) if params.structured is not None else None
        request = self.llm.request(serial, prompt, params, said, compiled=grammar is None)
        request.priority = priority
        self.loop.queue.check(request)
        answer = Answer(request, self.llm.tokenizer.backend_tokenizer)
        deadline = None if seconds is None else now + seconds
        job = Job(request, answer, on_event, serial, deadline, now)
        with self._changed:
            if self._draining:
                raise Overloaded("the server is shutting down; send the request to another one.")
            # A crowd may come while all places are free. Probes take nobody's, nor does who waits for a grammar.
            waiting = len(self._grammars)
            ahead = waiting if grammar else len(self._open) - len(self._probes) - waiting
            if ahead >= self.loop.state.count + self._most_waiting and not job.probe:
                raise Overloaded(f"the queue is full, {self._most_waiting} requests wait; try again in a second.")
            if grammar:
                self._grammars.add(grammar, job)
            else:
                heapq.heappush(self._pending, job)
            self._open[request] = job
            if job.probe:
                self._probes[request] = job
            self._changed.notify_all()
        return job

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._dead

    def cancel(self, job: Job) -> None:
        """End a job before the next iteration; nothing happens if it has ended."""
        with self._changed:
            if job.request in self._open:
                self._ending.append((job, "cancelled", ""))
                self._changed.notify_all()

    def _have_grammar(self, job: Job, failure: str) -> None:
        """Queue a job that has its grammar, or end it with the ``failure``; the lock is held."""
        if failure:
            self._ending.append((job, "invalid", failure))
        else:
            heapq.heappush(self._pending, job)
        self._changed.notify_all()

    def statistics(self) -> Statistics:
        """What is true now; may be asked for at any time."""
        loop, state, planner = self.loop, self.loop.state, self.loop.planner
        queued = len(self._grammars) + len(self._pending) + len(loop.queue.waiting)
        counters = loop.counters.copy()
        ended = dict(self._ended)
        running = loop.queue.running
        return Statistics(
            queued=queued,
            running=running,
            blocks=state.num_blocks,
            blocks_used=state.used_blocks,
            blocks_cached=state.cached_blocks,
            policy=planner.name,
            budget=planner.budget,
            counters=counters,
            drafts=planner.totals(),
            ended=ended,
            engine_failures=self._engine_failures,
            queued_tokens=sum(len(job.request.prompt) for job in list(self._pending)),
            gain=planner.gain(),
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
        overlap(self.loop.target, lambda: None)  # else engine and service hold each other, and the engine its memory

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._end_as_told()
                self._end_late()
                self._feed()
                self._iterate()
        except Exception:  # whatever it was: nobody must wait for an answer that never comes
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

    def _end_as_told(self) -> None:
        with self._changed:
            ending, self._ending = self._ending, []
        for job, reason, message in ending:
            self._end(job, reason, message)

    def _end_late(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._open.values() if job.deadline is not None and job.deadline <= now]
        for job in late:
            self._end(job, "deadline")

    def _feed(self) -> None:
        """Hand the loop what it has a place for, or a suspect by itself."""
        loop = self.loop
        if self._suspects.on_trial:
            return
        if suspect := self._suspects.next_trial():
            loop.queue.add(suspect.request)
            return
        while len(loop.queue.waiting) + loop.queue.running < loop.state.count:
            with self._changed:
                if not self._pending:
                    return
                job = heapq.heappop(self._pending)
            job.taken = job.taken or time.monotonic()
            loop.queue.add(job.request)

    def _iterate(self) -> None:
        before = self.loop.counters.iterations
        with self._changed:
            probes = list(self._probes.values())
        try:
            emission = self.loop.step()  # an engine that overlaps has the due tokens told meanwhile
        except Exception as error:  # _recover logs it
            self._recover(error)
            return
        self._tell_due()
        self._end_broken()
        self._hand_over(emission)
        if self.loop.counters.iterations > before:
            for job in probes:
                self._end(job, "busy")  # no effect on a probe that has had its token
        if len(emission.requests) and (cleared := self._suspects.cleared()):
            self.loop.queue.preempt_all()
            self._requeue([cleared])

    def _hand_over(self, emission: Emission) -> None:
        """Tell an iteration's tokens, or let them wait for the next pass, which takes as long with or without.

        A stop string may end a request, which cannot be done during a pass, so tokens of such requests do not wait.
        """
        now = time.monotonic()
        waits = (
            self._overlaps
            and self.loop.queue.busy
            and self._suspects.on_trial is None
            and len(emission.requests) >= MANY
        )
        for request, tokens in emission:
            if (job := self._open.get(request)) is None:
                continue
            self._due.append((job, tokens, now))
            if not waits or request.params.stop:
                self._tell(*self._due.pop())
        self._end_broken()

    def _tell_due(self) -> None:
        while self._due:
            self._tell(*self._due.popleft())

    def _tell(self, job: Job, tokens: Sequence[int], when: float) -> None:
        """Tell a request's new tokens, and its end where they bring it."""
        job.first_token = job.first_token or when
        try:
            said = job.answer.take(self.loop, tokens)
        except Exception as error:  # one request's text is no other's trouble
            log.exception("request %s cannot be put into text", job.request.id)
            self._broken[job] = f"its tokens could not be put into text ({_sentence(error)})."
            return
        if job.request.finish_reason:
            self._close_job(job, said, job.request.finish_reason, job.request.failure, when)
        elif said.token_ids:
            self._send(job, Event(**vars(said), time=when))

    def _end_broken(self) -> None:
        while self._broken:
            self._end(next(iter(self._broken)), "failed")

    def _end(self, job: Job, reason: str, message: str = "") -> None:
        """End a job between two iterations, wherever it is; its KV blocks are free at once."""
        self._tell_due()
        if job in self._broken:
            reason, message = "failed", self._broken.pop(job)
        if job.request not in self._open:
            return
        self.loop.queue.cancel(job.request)
        with self._changed:
            if job in self._pending:
                self._pending.remove(job)
                heapq.heapify(self._pending)
            self._grammars.remove(job)
        self._suspects.dismiss(job)
        job.request.finish_reason = reason
        said = NOTHING
        if reason != "failed":
            try:
                said = job.answer.take(self.loop, [])  # what was held back
            except Exception:  # as in _tell
                log.exception("what request %s held back cannot be put into text", job.request.id)
        self._close_job(job, said, reason, message)

    def _close_job(self, job: Job, said: Said, reason: str, message: str = "", when: float | None = None) -> None:
        request, since = job.request, job.submitted
        end = End(
            reason=reason,
            message=message,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens or 0,
            completion_tokens=job.answer.told,
            verifications=request.verifications,
            drafted=request.drafted,
            queue_seconds=job.taken and job.taken - since,
            first_token_seconds=job.first_token and job.first_token - since,
        )
        self._ended[reason] += 1
        self._send(job, Event(**vars(said), time=when or time.monotonic(), end=end))
        with self._changed:
            del self._open[request]
            self._probes.pop(request, None)
            self._changed.notify_all()

    def _send(self, job: Job, event: Event) -> None:
        try:
            job.on_event(event)
        except Exception:  # a listener's trouble is its own request's alone
            log.exception("the listener of request %s failed; the request is cancelled", job.request.id)
            if event.end is None:
                self.cancel(job)

    # -- when the engine fails -------------------------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """Empty the loop. What was running is tried again, one by one (``Suspects``); what waited there waits here."""
        log.exception("the engine failed; requests that were running are tried one by one")
        self._engine_failures += 1
        with self._changed:  # others submit meanwhile
            running = [job for job in self._open.values() if job.request.slot >= 0]
            known = {*self._pending, *self._suspects.waiting}
            inside = [job for job in self._open.values() if job not in known and job not in self._grammars]
        self.loop.queue.preempt_all()
        self.loop.state.forget_cached()  # nobody knows what the engine has left in its pool
        self._due.clear()  # those tokens are among the untold ones
        for job in (job for job in inside if job not in self._broken):
            untold = job.request.generated[job.answer.told :]  # the iteration may have failed after it had its tokens
            if untold or job.request.finish_reason:
                self._tell(job, untold, time.monotonic())
        self._end_broken()
        unended = [job for job in running if job.request in self._open]
        if guilty := self._suspects.accuse(unended, alone=len(running) == 1):
            self._end(guilty, "failed", f"the engine fails on this request ({_sentence(error)}).")
        self._requeue([job for job in inside if job not in running])

    def _requeue(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                if job.request in self._open:
                    heapq.heappush(self._pending, job)

    def _fail_all(self, message: str) -> None:
        with self._changed:
            self._draining = True
        try:
            self._tell_due()  # answers that are complete are no failures
        except Exception:  # the jobs below must end, too
            log.exception("the tokens of the last iteration could not be told")
        for job in list(self._open.values()):
            try:
                self._close_job(job, NOTHING, "failed", message)
            except Exception:  # the others must end, too
                log.exception("request %s could not be ended", job.request.id)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
