"""A request of the engine core, and the output of one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from echo_trt.engine.params import SamplingParams, TokenLogprobs, TokenSource
from echo_trt.grammar.state import State
from echo_trt.speculation.arrays import begins


@dataclass(eq=False)
class Request:
    """A request from its arrival to its end.

    ``generated`` is its text so far whenever it is not running (slot -1); a finish_reason says that it has ended.
    ``logprobs`` and ``sources`` have an entry for each token that was emitted, where the request asks for them.
    ``cached_tokens`` of the prompt were in the prefix cache when the request first got a slot. Of running requests the
    one with the highest ``priority`` number gives way first.
    """

    id: int
    prompt: np.ndarray
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    sources: list[TokenSource] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt but its first token
    verifications: int = 0
    drafted: int = 0
    cached_tokens: int | None = None
    finish_reason: str = ""
    slot: int = -1
    priority: int = 0
    grammar: State | None = None  # what may follow its text so far, None: anything; while it runs its slot has it
    failure: str = ""  # why, where the finish_reason is "failed"
    keys: list[bytes] = field(default_factory=list)  # of its text's blocks in the prefix cache


@dataclass(frozen=True)
class StepOutput:
    """The tokens of one iteration.

    requests object [B]; tokens int64 [sum counts], end to end; counts int64 [B]
    """

    requests: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray

    def __iter__(self) -> Iterator[tuple[Request, list[int]]]:
        tokens, begin = self.tokens.tolist(), begins(self.counts).tolist()
        for i, request in enumerate(self.requests):
            yield request, tokens[begin[i] : begin[i + 1]]


NOTHING = StepOutput(np.empty(0, object), np.zeros(0, np.int64), np.zeros(0, np.int64))
