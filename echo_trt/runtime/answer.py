"""A request's answer as it grows: what the loop emits for it becomes text, and a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from echo_trt.runtime.loop import Loop
from echo_trt.runtime.params import Completion, TokenLogprobs, TokenSource
from echo_trt.runtime.request import Request
from echo_trt.runtime.text import TextStream


@dataclass(frozen=True)
class Said:
    """What became certain: text, tokens, and where asked for their logprobs and sources, an entry each.

    ``offsets``, where either is asked for: where the text of each next token begins, for those whose text has come.
    """

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    offsets: Sequence[int] = ()
    sources: Sequence[TokenSource] = ()


class Answer:
    """``told`` counts the tokens that ``take`` has returned."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        """Begin behind what ``request`` has generated already: another engine has told it."""
        self.request, self.told = request, len(request.generated)
        self._text = TextStream(tokenizer, request.params.stop, request.params.min_tokens)
        self._text.push(request.generated)
        self._text.settle()

    def take(self, loop: Loop, tokens: Sequence[int]) -> Said:
        """The text that became certain, all of it once the request has ended, and those tokens that count.

        A stop string ends the request here; it may end inside an accepted path, and what follows it was never said.
        """
        request, stream = self.request, self._text
        piece, used = stream.push(tokens)
        end = self.told + used
        if stream.stopped:
            loop.queue.cancel(request)
            del request.generated[end:], request.logprobs[end:], request.sources[end:]
            request.finish_reason = "stop"
        if request.finish_reason:
            piece += stream.finish()
            if stream.stopped:  # a character that only the end made certain completed a stop string
                request.finish_reason = "stop"
        begin, self.told = self.told, end
        if request.params.logprobs is None and not request.params.token_sources:
            return Said(piece, tokens[:used])
        return Said(piece, tokens[:used], request.logprobs[begin:end], stream.settle(), request.sources[begin:end])

    def completion(self) -> Completion:
        request = self.request
        accepted = len(request.generated) / max(request.verifications, 1)
        logprobs = None if request.params.logprobs is None else request.logprobs
        prompt_logprobs = None if request.params.prompt_logprobs is None else request.prompt_logprobs
        return Completion(
            self._text.text,
            request.generated,
            request.finish_reason,
            accepted,
            len(request.prompt),
            logprobs,
            prompt_logprobs,
            request.sources if request.params.token_sources else None,
        )
