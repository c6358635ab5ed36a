"""A request of the loop, and news of its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from echo_trt.engine.params import SamplingParams, TokenLogprobs, TokenSource
from echo_trt.grammar.state import State

#: Reasons of an answer's end that are errors.
ERRORS = ("failed", "cancelled", "invalid")
#: The priority of a probe, a request of one token, by which it is known: before everyone else in the queue.
FIRST = -(2**31)


class Sender(NamedTuple):
    """Whose request it is.

    tenant  who has to share slots and passes with others; empty: with an engine without keys everyone is one
    salt    of the prefix cache: requests of one salt find each other's text; empty: that of all without one
    """

    tenant: bytes = b""
    salt: bytes = b""


ANYONE = Sender()


class Event(Struct, tag=True, omit_defaults=True, kw_only=True):
    """News of an answer: new tokens, and with the last news its end. On the socket it is a message (``process.wire``).

    id                   the number of the client's question, where the event is sent on the socket
    logprobs, sources    where asked for, an entry per token
    prompt_logprobs      of the first event, where asked for: of the prompt but its first token
    time                 time.monotonic() at which the engine had the tokens

    Of the last event alone:

    reason               stop, length, cancelled, deadline, failed or invalid (its grammar cannot be used); of a
                         probe also busy: no slot was free, and a finished iteration of other requests proves as much as
                         a token. Empty: the answer goes on
    message              why the request failed or is invalid
    cached_tokens        prompt tokens that the prefix cache had
    drafted, accepted    draft tokens of each verification that had any, and how many of them were accepted
    predicted            tokens that were the prediction's next
    saved, saved_error   seconds by which it came sooner than by plain decoding, and their standard error; None: unknown
    queue_seconds        from submission until the engine took the request; None: it never did
    first_token_seconds  from submission until the first token; None: it never came
    """

    id: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    sources: list[TokenSource] = []
    prompt_logprobs: list[TokenLogprobs] = []
    time: float = 0.0
    reason: str = ""
    message: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    verifications: int = 0
    drafted: list[int] = []
    accepted: list[int] = []
    predicted: int = 0
    saved: float | None = None
    saved_error: float = 0.0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None

    def appended_to(self, earlier: Event) -> Event:
        """Put ``earlier`` news of the answer before these; returns these."""
        self.token_ids, self.logprobs = earlier.token_ids + self.token_ids, earlier.logprobs + self.logprobs
        self.sources = earlier.sources + self.sources
        self.prompt_logprobs = earlier.prompt_logprobs or self.prompt_logprobs
        return self


@dataclass
class SpeculationRecord:
    """What became of a request's drafts.

    drafts  draft tokens of each verification that had any, and those of them that the text went on behind
    saved   as of ``Event``, with its error; NaN: unknown
    """

    drafts: list[tuple[int, int]] = field(default_factory=list)
    saved: tuple[float, float] = (math.nan, 0.0)


@dataclass(eq=False)
class Request:
    """A request from its arrival to its end.

    ``generated`` is its text so far whenever it is not running (slot -1); a finish_reason says that it has ended.
    ``logprobs`` and ``sources`` have an entry for each token that was emitted, where the request asks for them.
    ``cached_tokens`` of the prompt were in the prefix cache when the request first got a slot. Of running requests the
    one with the highest ``priority`` number gives way first. It was ``submitted`` and had its first token (``started``)
    at times of time.monotonic().

    calls  int64 [n], the skeleton of the calls of its tools (``sources.calls``)
    """

    id: int
    prompt: np.ndarray
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    sources: list[TokenSource] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt but its first token
    verifications: int = 0
    speculation: SpeculationRecord = field(default_factory=SpeculationRecord)
    calls: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    cached_tokens: int | None = None
    finish_reason: str = ""
    slot: int = -1
    priority: int = 0
    submitted: float = 0.0
    started: float | None = None
    grammar: State | None = None  # what may follow its text so far, None: anything; while it runs its slot has it
    failure: str = ""  # why, where the finish_reason is "invalid"
    keys: list[bytes] = field(default_factory=list)  # of its text's blocks in the prefix cache
    sender: Sender = ANYONE

    @property
    def probe(self) -> bool:
        """Whether it only asks if the engine works: no counter has its tokens."""
        return self.priority == FIRST and self.params.max_tokens == 1
