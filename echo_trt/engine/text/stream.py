"""Tokens to text as they come: whole characters only, and stop strings wherever they begin and end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from echo_trt.engine.params import Completion, SamplingParams
from echo_trt.engine.request import ERRORS, Event, Request
from echo_trt.engine.text.entries import OutgoingLogprobs, OutgoingSources

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from echo_trt.engine.text.prompts import PromptInput, PromptReader


class TextStream:
    """One request's text. ``text`` has been emitted; a possible beginning of a stop string is held back.

    Stop strings that are complete before ``min_tokens`` are text like any other. ``stopped`` is the one that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
        from tokenizers.decoders import DecodeStream  # a machine that measures a card may have no tokenizers

        self._tokenizer, self._stop, self._min_tokens = tokenizer, tuple(stop), min_tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._begins: list[int] = []  # of each token's text
        self._settled = 0
        self._decoded = ""
        self.text = ""
        self.stopped = ""

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the text that became certain and how many tokens were used: fewer once a stop string is complete."""
        for used, token in enumerate(tokens, 1):
            self._tokens.append(token)
            self._begins.append(len(self._decoded))
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                self._begins[-1] += self._before_own(piece)
                self._extend(piece)
                if self.stopped:
                    return self._give_out(len(self._decoded)), used
        held_back = max((overlap(self._decoded, stop) for stop in self._stop), default=0)
        return self._give_out(len(self._decoded) - held_back), len(tokens)

    def finish(self) -> str:
        """Whatever was held back; bytes that never became a character come as U+FFFD."""
        if not self.stopped:
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if whole.startswith(self._decoded):
                self._extend(whole[len(self._decoded) :])
        return self._give_out(len(self._decoded))

    def settle(self) -> list[int]:
        """Where the text of each next token begins, for those whose text was first given out since the last call.

        Tokens whose text a stop string cuts off are never among them.
        """
        before, self._settled = self._settled, bisect_left(self._begins, len(self.text))
        return self._begins[before : self._settled]

    def _before_own(self, piece: str) -> int:
        """Return how much of ``piece`` belongs to earlier tokens: bytes that were no whole character until now."""
        if self._begins[-2:-1] != self._begins[-1:]:  # none was waiting
            return 0
        own = self._tokenizer.decode(self._tokens[-1:], skip_special_tokens=True)
        return 0 if "\ufffd" in own or not piece.endswith(own) else len(piece) - len(own)

    def _extend(self, piece: str) -> None:
        """Append what was decoded, up to the first stop string that it completes."""
        before = len(self._decoded)
        self._decoded += piece
        if len(self._tokens) < self._min_tokens:
            return
        found = [(p, s) for s in self._stop if (p := self._decoded.find(s, max(before - len(s) + 1, 0))) >= 0]
        if found:
            end, self.stopped = min(found)
            self._decoded = self._decoded[:end]

    def _give_out(self, end: int) -> str:
        new = self._decoded[len(self.text) : end]
        self.text += new
        return new


class AnswerText:
    """The text of an answer, made of its tokens as they come; a stop string ends it, maybe inside an accepted path.

    used  tokens of the answer so far: what follows a stop string was never said
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, generated: Sequence[int] = ()):
        """Begin behind what was ``generated`` already: another engine has told it."""
        self._stream = TextStream(tokenizer, params.stop, params.min_tokens)
        self._stream.push(generated)
        self._stream.settle()
        self.used = len(generated)

    @property
    def stopped(self) -> str:
        """The stop string that ended it; empty: none has."""
        return self._stream.stopped

    def take(self, tokens: Sequence[int], last: bool) -> tuple[str, int, list[int]]:
        """Take new tokens; ``last``: the answer has ended with them.

        Returns the text that became certain, how many of the tokens are the answer's, and where the text of each next
        token begins, of tokens whose text has come.
        """
        if self.stopped:
            return "", 0, []
        piece, used = self._stream.push(tokens)
        if last:
            piece += self._stream.finish()
        self.used += used
        return piece, used, self._stream.settle()

    def read(self, event: Event) -> tuple[str, list[int], bool]:
        """Take an event's tokens; it loses those behind a stop string, which is then the answer's end.

        Returns text and offsets as ``take``, and whether the engine goes on behind the stop string: tell it to stop.
        """
        before = self.stopped
        piece, used, offsets = self.take(event.token_ids, bool(event.reason) and event.reason != "failed")
        event.token_ids, event.logprobs = event.token_ids[:used], event.logprobs[:used]
        event.sources = event.sources[:used]
        if self.stopped:
            event.completion_tokens = self.used
            event.reason = "stop" if event.reason and event.reason not in ERRORS else event.reason
        return piece, offsets, bool(self.stopped) and not before and not event.reason

    def follow(
        self, request: Request, tokens: Sequence[int], cancel: Callable[[Request], None]
    ) -> tuple[str, int, list[int]]:
        """Take new tokens of a request between two iterations; a stop string ends it, by ``cancel``. As ``take``."""
        taken = self.take(tokens, bool(request.finish_reason))
        if self.stopped:
            cancel(request)
            del request.generated[self.used :], request.logprobs[self.used :], request.sources[self.used :]
            request.finish_reason = "stop"
        return taken

    def completion(self, request: Request) -> Completion:
        """Return a finished request as its caller gets it."""
        return Completion(
            self._stream.text,
            request.generated,
            request.finish_reason,
            len(request.generated) / max(request.verifications, 1),
            len(request.prompt),
            None if request.params.logprobs is None else request.logprobs,
            None if request.params.prompt_logprobs is None else request.prompt_logprobs,
            request.sources if request.params.token_sources else None,
        )


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``mark``."""
    begin = text.find(mark[0], max(len(text) - len(mark) + 1, 0))
    while begin >= 0 and not mark.startswith(text[begin:]):
        begin = text.find(mark[0], begin + 1)
    return len(text) - begin if begin >= 0 else 0


class OutgoingText:
    """An answer's text from its tokens, as they come.

    text                        of all tokens so far
    ids                         the prompt's
    in_thought                  whether the prompt ends inside a thought; None for a model that does not think
    prediction                  tokens that the client expects
    unsent, tokens              text and tokens that the sender has not taken yet
    logprobs, sources           likewise; None where the request does not ask for them
    """

    def __init__(
        self, reader: PromptReader, prompt: PromptInput, ids: list[int], params: SamplingParams, echoes: bool = False
    ):
        """``echoes``: whether the prompt's text precedes the answer's."""
        self.ids, self.in_thought, self.prediction = ids, reader.in_thought(ids), len(params.prediction_ids)
        echoed = reader.echoed(prompt) if echoes else ""
        self.unsent, self.tokens = echoed, list[int]()
        self._params, self.text, self._began = params, AnswerText(reader.tokenizer.backend_tokenizer, params), False
        wanted = params.logprobs is not None or params.prompt_logprobs is not None
        self.logprobs = OutgoingLogprobs(reader.texts, echoed) if wanted else None
        self.sources = OutgoingSources(reader.texts) if params.token_sources else None

    def add(self, event: Event) -> bool:
        """Take news, as ``AnswerText.read``; say whether the engine must be told to stop."""
        piece, offsets, stops = self.text.read(event)
        self.unsent += piece
        self.tokens += event.token_ids
        if self.logprobs:
            if not self._began and self._params.prompt_logprobs is not None:
                self.logprobs.begin(self.ids, event.prompt_logprobs)
            if self._params.logprobs is not None:
                self.logprobs.take(event.logprobs, offsets)
        if self.sources:
            self.sources.take(event.sources, offsets)
        self._began = True
        return stops

    def take(self) -> tuple[str, list[int]]:
        """Return unsent text and tokens, which are sent then."""
        taken, self.unsent, self.tokens = (self.unsent, self.tokens), "", []
        return taken
