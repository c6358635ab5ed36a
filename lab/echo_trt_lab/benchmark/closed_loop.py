"""One run of one policy with all slots kept full: its tokens, its speed, and the seconds of its phases."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from echo_trt.engine.core import EngineCore
from echo_trt.engine.params import Counters, SamplingParams
from echo_trt.engine.request import Request
from echo_trt_lab.benchmark.peer import Work

TARGETED = 4  # every so many requests have latency targets, where there are any
SLICE = 1.0  # seconds of a turn; larger: a machine that slows down meanwhile favours a policy more
PHASES = ("draft", "plan", "pack", "verify", "accept", "commit")


@dataclass
class PhaseSums:
    """Sums over iterations; ``seconds`` by phase."""

    iterations: int = 0
    elapsed: float = 0.0
    tokens: int = 0
    verifications: int = 0
    verified: int = 0
    drafted: int = 0
    draft_passes: int = 0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def add(self, before: Counters, after: Counters, elapsed: float) -> None:
        self.iterations += 1
        self.elapsed += elapsed
        self.tokens += after.emitted_tokens - before.emitted_tokens
        self.verifications += after.verifications - before.verifications
        self.verified += after.verified_tokens - before.verified_tokens
        self.drafted += after.drafted_tokens - before.drafted_tokens
        self.draft_passes += after.draft_passes - before.draft_passes
        for phase in PHASES:
            self.phases[phase] += after.seconds.get(phase, 0.0) - before.seconds.get(phase, 0.0)


@dataclass
class StepSample:
    """Measurements of one run.

    decode    iterations in which every slot decoded
    whole     all iterations, also those that computed prompts
    prompts   tokens of prompts that were computed
    ttft      seconds from a request's arrival to its first token
    gaps      seconds between the emissions of a request
    pace      seconds per token of a request, without its first token
    progress  tokens per iteration of a request
    accepted  draft tokens by source, where the policy counts them
    texts     request -> token ids
    by_prompt prompt -> its tokens, and its share of the seconds, of iterations in which every slot decoded
    targeted  (seconds to the first token, per token behind it) of the requests with latency targets
    """

    decode: PhaseSums = field(default_factory=PhaseSums)
    whole: PhaseSums = field(default_factory=PhaseSums)
    prompts: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    pace: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    accepted: Counter[str] = field(default_factory=Counter)
    texts: dict[int, list[int]] = field(default_factory=dict)
    by_prompt: dict[int, tuple[float, float]] = field(default_factory=dict)
    targeted: list[tuple[float, float]] = field(default_factory=list)

    @property
    def prefill(self) -> Work:
        """Return the tokens of prompts, and the seconds in which a request waited for its first token."""
        return Work(self.prompts, self.whole.elapsed - self.decode.elapsed)


class ClosedLoop:
    """Answers ``prompts`` under the current policy, ``batch`` at once; the next begins as one ends.

    After the last prompt they begin again, so that all slots are full until every prompt has an answer. Without that,
    the last iterations, of long texts with a low acceptance rate, would run at a smaller batch. Second answers are not
    kept. ``seconds`` is a clock that stands still between iterations, so that other runs may take turns.
    """

    def __init__(
        self,
        loop: EngineCore,
        prompts: list[list[int]],
        batch: int,
        params: SamplingParams,
        latency: dict[str, float] | None = None,
    ):
        """``latency``: targets of every TARGETED-th request; None: the policy is told of none."""
        self.loop, self.batch, self.sample = loop, batch, StepSample()
        self._targeted = replace(params, latency=latency)
        self.seconds, self.emitted = 0.0, 0
        self._prompts, self._params = [np.asarray(ids) for ids in prompts], params
        self._begun = 0
        self._running: dict[Request, _Clock] = {}
        self._accepted = _accepted(loop)

    @property
    def busy(self) -> bool:
        return len(self.sample.texts) < len(self._prompts)

    def run(self, seconds: float = math.inf) -> None:
        """Run for some ``seconds``, one iteration at least, or to the end."""
        end = self.seconds + seconds
        while self.busy:
            self._step()
            if self.seconds >= end:
                break

    def _step(self) -> None:
        loop, sample, running = self.loop, self.sample, self._running
        while len(running) < self.batch:
            params = self._params if self._begun % TARGETED else self._targeted
            request = Request(self._begun, self._prompts[self._begun % len(self._prompts)], params)
            loop.scheduler.add(request)
            running[request] = _Clock(self.seconds, first_answer=self._begun < len(self._prompts))
            self._begun += 1
        before, begin = loop.counters.copy(), time.perf_counter()
        emissions = list(loop.step())
        elapsed = time.perf_counter() - begin
        self.seconds += elapsed
        sample.whole.add(before, loop.counters, elapsed)
        sample.prompts += loop.counters.prompt_tokens - before.prompt_tokens
        if loop.counters.prompt_tokens == before.prompt_tokens:
            sample.decode.add(before, loop.counters, elapsed)
            for request, tokens in emissions:
                prompt = request.id % len(self._prompts)
                done = sample.by_prompt.get(prompt, (0.0, 0.0))
                sample.by_prompt[prompt] = done[0] + len(tokens), done[1] + elapsed / len(emissions)
        for request, tokens in emissions:
            self.emitted += len(tokens)
            running[request].emitted(self.seconds, len(tokens), sample)
            if request.finish_reason:
                running.pop(request).ended(request, sample)
        if not self.busy:
            sample.accepted = _accepted(loop) - self._accepted
            for request in running:
                loop.scheduler.cancel(request)


def _accepted(loop: EngineCore) -> Counter[str]:
    """Count accepted draft tokens of an engine core's policy so far, by source."""
    return Counter({source: int(count) for source, count in loop.planner.totals().get("accepted", {}).items()})


def run_side_by_side(runs: list[ClosedLoop]) -> None:
    """Run all to their ends in turns of SLICE seconds; the next turn goes to the run with the fewest tokens.

    A machine that slows down or recovers meanwhile then does so for all runs alike. Every run needs another loop.
    """
    while busy := [run for run in runs if run.busy]:
        min(busy, key=lambda run: run.emitted).run(SLICE)


@dataclass
class _Clock:
    arrived: float
    first_answer: bool
    first: float = 0.0
    last: float = 0.0

    def emitted(self, now: float, count: int, sample: StepSample) -> None:
        if not self.last:
            self.first = now
        if self.first_answer and not self.last:
            sample.ttft.append(now - self.arrived)
        elif self.first_answer and count:
            sample.gaps.append(now - self.last)
        self.last = now

    def ended(self, request: Request, sample: StepSample) -> None:
        if not self.first_answer:
            return
        sample.texts[request.id] = request.generated
        length = len(request.generated)
        if length > 1:
            sample.pace.append((self.last - self.first) / (length - 1))
            if request.id % TARGETED == 0:
                sample.targeted.append((self.first - self.arrived, sample.pace[-1]))
            sample.progress.append(length / max(request.verifications, 1))
