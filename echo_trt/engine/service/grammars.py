"""Grammars on their way to being compiled, on a thread of their own: requests that need none never wait for them."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from echo_trt.engine.llm import LLM
from echo_trt.engine.service.job import Job, Overloaded
from echo_trt.errors import UserError

log = logging.getLogger(__name__)

#: Grammars that may wait to be compiled; larger: a client with slow ones, of two seconds each, is refused later, and a
#: new grammar of another client waits longer.
MAX_GRAMMARS = 32


class GrammarQueue:
    """Compiles grammars one at a time, by priority, then by arrival; each once for all jobs that wait for it.

    Grammars that were compiled meanwhile come first; grammars for which no job waits are dropped.
    """

    def __init__(self, llm: LLM, changed: threading.Condition, done: Callable[[Job, str], None]):
        """``done`` is called for every job once it has its grammar, with "", or the reason why it has none.

        ``changed`` is the service's lock. It must be held for ``add`` and ``remove``, and is while ``done`` is told.
        """
        self._llm, self._changed, self._done = llm, changed, done
        self._waiting: dict[str, list[Job]] = {}  # by grammar
        self._closed = False
        with suppress(UserError):  # a tokenizer that no grammar reads; who asks for one is told
            llm.grammars.prepare()
        self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return sum(map(len, [*self._waiting.values()]))  # of a copy: statistics do not hold the lock

    def __contains__(self, job: Job) -> bool:
        return any(job in jobs for jobs in self._waiting.values())

    def add(self, grammar: str, job: Job) -> None:
        """Let a job wait for its grammar. Raises Overloaded."""
        held = Counter(jobs[0].tenant for jobs in self._waiting.values())
        has_share = held[job.tenant] * len(held.keys() | {job.tenant}) >= MAX_GRAMMARS
        if grammar not in self._waiting and len(self._waiting) >= MAX_GRAMMARS and has_share:
            sentence = f"the queue is full, {MAX_GRAMMARS} grammars wait to be compiled; try again in a second."
            raise Overloaded("queue_full", sentence, 1)
        self._waiting.setdefault(grammar, []).append(job)
        self._changed.notify_all()

    def remove(self, job: Job) -> bool:
        """Forget a job; False: it does not wait here."""
        for grammar, jobs in self._waiting.items():
            if job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[grammar]
                return True
        return False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            failure = self._compile(jobs[0])
            for job in jobs:
                message = failure or self._compile(job)  # which takes no time now
                with self._changed:
                    if self.remove(job):
                        self._done(job, message)

    def _next(self) -> list[Job]:
        """Wait for the jobs of the next grammar; none: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            compiled = [jobs for grammar, jobs in self._waiting.items() if self._llm.grammars.keeps(grammar)]
            return list(min(compiled or self._waiting.values(), key=min))

    def _compile(self, job: Job) -> str:
        """Set a job's grammar; returns why that cannot be."""
        try:
            self._llm.set_grammar(job.request)
        except UserError as mistake:
            return str(mistake)
        except Exception as error:  # one request's grammar is no other's trouble
            log.exception("the grammar of a request cannot be set", extra=job.named)
            return f"structured cannot be used ({type(error).__name__}); fix or simplify it."
        return ""
