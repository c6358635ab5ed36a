"""The search for the request on which the engine fails."""

from __future__ import annotations

from collections.abc import Sequence

from echo_trt.serving.job import Job

MOST_FAILURES = 2  # in a row, after which a request that ran alone is guilty; larger: a bad request is tried more often


class Suspects:
    """Tries the requests that were running when the engine failed, one by one: only what fails alone, fails.

    Every such request is a suspect. ``next_trial`` takes one to run by itself, while all others wait. A trial ends in
    one of two ways: the request emits a token (``cleared``), or the engine fails again (``accuse``). Only the engine's
    thread may call these methods; it moves the requests into the loop and out of it.

    on_trial  the suspect that runs by itself now
    waiting   suspects that are still to be tried, in order
    """

    def __init__(self) -> None:
        self.on_trial: Job | None = None
        self.waiting: list[Job] = []

    def next_trial(self) -> Job | None:
        """Return the next suspect, which is on trial from now on; None: there is no suspect."""
        self.on_trial = self.waiting.pop(0) if self.waiting else None
        return self.on_trial

    def cleared(self) -> Job | None:
        """End the trial: the engine has done again what it failed at, with this request alone.

        Returns the request if it must leave the engine to further suspects.
        """
        job, self.on_trial = self.on_trial, None
        if job is None:
            return None
        job.failures = 0
        return job if self.waiting else None

    def accuse(self, jobs: Sequence[Job], alone: bool) -> Job | None:
        """End the trial, and suspect the requests that the engine failed on. Returns the guilty one, to be ended.

        jobs   running requests that have not ended
        alone  whether a single one was running, ended or not
        """
        self.on_trial = None
        for job in jobs:
            job.failures += 1
            if alone and job.failures >= MOST_FAILURES:
                return job
        self.waiting += jobs
        return None

    def dismiss(self, job: Job) -> None:
        """Forget a request that has ended."""
        if job in self.waiting:
            self.waiting.remove(job)
        if job is self.on_trial:
            self.on_trial = None
