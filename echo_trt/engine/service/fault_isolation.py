"""The search for the request on which the engine fails."""

from __future__ import annotations

from collections.abc import Sequence

from echo_trt.engine.service.job import Job

MAX_FAILURES = 2  # consecutive failures of a request that ran alone, after which it fails; larger: more retries
MAX_TOGETHER = 3  # failures of a request beside others without progress, after which it fails; larger: more retries
PROGRESS = 32  # tokens by which a text grows between two failures that count afresh; larger: guiltless ones fail sooner


class FaultIsolation:
    """Retries, one by one, the requests that were running when the engine failed; the one it fails on alone is faulty.

    Every such request is a suspect. ``next_trial`` takes one to run by itself, while all others wait. A trial ends in
    one of two ways: the request emits a token (``cleared``), or the engine fails again (``engine_failed``). Where the
    engine fails again and again on requests that it ran alone, the one that was there most often is faulty, and of
    several the youngest, with which that began. Only the engine's thread may call these methods; it adds requests to
    the scheduler and takes them out.

    on_trial  the suspect that runs by itself now
    waiting   suspects that are still to be tried, in order
    given_up  requests so far that failed beside others alone
    """

    def __init__(self) -> None:
        self.on_trial: Job | None = None
        self.waiting: list[Job] = []
        self.given_up = 0

    def next_trial(self) -> Job | None:
        """Return the next suspect, which is on trial from now on; None: there is no suspect."""
        self.on_trial = self.waiting.pop(0) if self.waiting else None
        return self.on_trial

    def cleared(self) -> Job | None:
        """End the trial: the engine has run this request alone.

        Returns the request if it must be preempted for further suspects.
        """
        job, self.on_trial = self.on_trial, None
        if job is None:
            return None
        job.failures = 0
        return job if self.waiting else None

    def engine_failed(self, jobs: Sequence[Job], alone: bool) -> Job | None:
        """End the trial, and suspect the requests that the engine failed on. Returns the faulty one, to be ended.

        jobs   running requests that have not ended
        alone  whether a single one was running, ended or not
        """
        self.on_trial = None
        for job in jobs:
            job.failures += 1
            if alone and job.failures >= MAX_FAILURES:
                return job
        self.waiting += jobs
        return None if alone else self._faulty_beside_others(jobs)

    def _faulty_beside_others(self, jobs: Sequence[Job]) -> Job | None:
        for job in jobs:
            progress = len(job.request.generated) - job.failed_at > PROGRESS
            job.failed_together = 1 if progress else job.failed_together + 1
            job.failed_at = len(job.request.generated)
        worst = max(jobs, key=lambda job: (job.failed_together, job.request.id), default=None)
        if worst is None or worst.failed_together <= MAX_TOGETHER:
            return None
        self.given_up += 1
        return worst

    def dismiss(self, job: Job) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        if job is self.on_trial:
            self.on_trial = None
