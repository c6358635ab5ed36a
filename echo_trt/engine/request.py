"""A request of the loop, its text as it grows, and news of its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from echo_trt.engine.params import Completion, SamplingParams, TokenLogprobs, TokenSource
from echo_trt.engine.text import TextStream
from echo_trt.grammar.state import State

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(kw_only=True)
class Event:
    """News of an answer: what became certain, and with the last news its end. Tokens may precede their text.

    logprobs, sources    where asked for, an entry per token
    offsets              where either is asked for: where the text of each next token begins, of those with text
    time                 time.monotonic() at which the engine had the tokens

    Of the last event alone:

    reason               stop, length, cancelled, deadline, failed or invalid (its grammar cannot be used); of a
                         probe also busy: no slot was free, and a finished iteration of other requests proves as much as
                         a token. Empty: the answer goes on
    stop_string          the stop string that ended the text, if one did
    message              why the request failed or is invalid
    cached_tokens        prompt tokens that the prefix cache had
    drafted, accepted    draft tokens of each verification that had any, and those that the text went on behind
    queue_seconds        from submission until the engine took the request; None: it never did
    first_token_seconds  from submission until the first token; None: it never came
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    offsets: Sequence[int] = ()
    sources: Sequence[TokenSource] = ()
    time: float = 0.0
    reason: str = ""
    stop_string: str = ""
    message: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    verifications: int = 0
    drafted: Sequence[int] = ()
    accepted: Sequence[int] = ()
    queue_seconds: float | None = None
    first_token_seconds: float | None = None


@dataclass(eq=False)
class Request:
    """A request from its arrival to its end.

    ``generated`` is its text so far whenever it is not running (slot -1); a finish_reason says that it has ended.
    ``logprobs`` and ``sources`` have an entry for each token that was emitted, where the request asks for them.
    ``cached_tokens`` of the prompt were in the prefix cache when the request first got a slot. Of running requests the
    one with the highest ``priority`` number gives way first. It was ``submitted`` and had its first token (``started``)
    at times of time.monotonic(). ``text_stream`` turns its tokens into text, and ``reported`` counts the tokens that
    ``take`` has returned.

    drafted, accepted  draft tokens of each verification that had any, and those that the text went on behind
    """

    id: int
    prompt: np.ndarray
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    sources: list[TokenSource] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt but its first token
    verifications: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    finish_reason: str = ""
    slot: int = -1
    priority: int = 0
    counted: bool = True  # whether counters have its tokens
    submitted: float = 0.0
    started: float | None = None
    grammar: State | None = None  # what may follow its text so far, None: anything; while it runs its slot has it
    failure: str = ""  # why, where the finish_reason is "invalid"
    keys: list[bytes] = field(default_factory=list)  # of its text's blocks in the prefix cache
    salt: bytes = b""  # of these keys: requests of another salt do not find its text
    tenant: bytes = b""  # whose it is: slots and passes are shared by tenants
    text_stream: TextStream | None = None
    reported: int = 0

    def begin_text(self, tokenizer: Tokenizer) -> None:
        """Begin behind what was generated already: another engine has told it."""
        self.reported = len(self.generated)
        self.text_stream = TextStream(tokenizer, self.params.stop, self.params.min_tokens)
        self.text_stream.push(self.generated)
        self.text_stream.settle()

    def take(self, cancel: Callable[[Request], None], tokens: Sequence[int]) -> Event:
        """Return the text that became certain, all of it once the request has ended, and those tokens that count.

        A stop string ends the request, by ``cancel``, maybe inside an accepted path: what follows was never said.
        """
        assert self.text_stream
        piece, used = self.text_stream.push(tokens)
        end = self.reported + used
        if self.text_stream.stopped:
            cancel(self)
            del self.generated[end:], self.logprobs[end:], self.sources[end:]
            self.finish_reason = "stop"
        if self.finish_reason:
            piece += self.text_stream.finish()
            if self.text_stream.stopped:  # the last character, complete only at the end, completed a stop string
                self.finish_reason = "stop"
        event = Event(text=piece, token_ids=tokens[:used], stop_string=self.text_stream.stopped)
        if self.params.logprobs is not None or self.params.token_sources:
            event.logprobs, event.sources = self.logprobs[self.reported : end], self.sources[self.reported : end]
            event.offsets = self.text_stream.settle()
        self.reported = end
        return event

    def completion(self) -> Completion:
        assert self.text_stream
        return Completion(
            self.text_stream.text,
            self.generated,
            self.finish_reason,
            len(self.generated) / max(self.verifications, 1),
            len(self.prompt),
            None if self.params.logprobs is None else self.logprobs,
            None if self.params.prompt_logprobs is None else self.prompt_logprobs,
            self.sources if self.params.token_sources else None,
        )
