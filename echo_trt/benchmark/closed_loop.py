"""One run of one policy with all slots kept full: what it emitted, how fast, and where the time went."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from echo_trt.runtime.llm import LLM
from echo_trt.runtime.loop import Request
from echo_trt.runtime.params import Counters, SamplingParams

PHASES = ("draft", "gate", "allocate", "pack", "verify", "accept", "commit")


@dataclass
class Tally:
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
class Sample:
    """``decode``: iterations in which every slot decoded; ``whole``: those in which every slot was busy, prompts too.

    ttft, gaps: seconds from a request's arrival to its first token, and between its emissions; pace: seconds a token of
    each request, without its first; progress: tokens per iteration of each request. texts: token ids by request.
    """

    decode: Tally = field(default_factory=Tally)
    whole: Tally = field(default_factory=Tally)
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    pace: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)


def run(llm: LLM, prompts: list[list[int]], batch: int, max_tokens: int) -> Sample:
    """Answer ``prompts`` greedily under the policy in force, ``batch`` of them at once, the next as one ends.

    When the last prompt has begun, slots fall empty: those iterations are run but not counted.
    """
    loop, sample = llm.loop, Sample()
    waiting = deque(Request(i, np.asarray(ids), SamplingParams(max_tokens)) for i, ids in enumerate(prompts))
    running: dict[Request, _Clock] = {}
    while waiting or running:
        while waiting and len(running) < batch:
            request = waiting.popleft()
            loop.add(request)
            running[request] = _Clock(time.perf_counter())
        before, begin = loop.counters.copy(), time.perf_counter()
        emissions = list(loop.step())
        now = time.perf_counter()
        if len(running) == batch:
            sample.whole.add(before, loop.counters, now - begin)
            if loop.counters.prompt_tokens == before.prompt_tokens:
                sample.decode.add(before, loop.counters, now - begin)
        for request, tokens in emissions:
            running[request].emitted(now, len(tokens), sample)
            if request.finish_reason:
                running.pop(request).ended(request, sample)
    return sample


@dataclass
class _Clock:
    arrived: float
    first: float = 0.0
    last: float = 0.0

    def emitted(self, now: float, count: int, sample: Sample) -> None:
        if not self.last:
            self.first = now
            sample.ttft.append(now - self.arrived)
        elif count:
            sample.gaps.append(now - self.last)
        self.last = now

    def ended(self, request: Request, sample: Sample) -> None:
        sample.texts[request.id] = request.generated
        length = len(request.generated)
        if length > 1:
            sample.pace.append((self.last - self.first) / (length - 1))
            sample.progress.append(length / max(request.verifications, 1))
