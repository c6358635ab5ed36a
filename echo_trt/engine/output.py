"""Output processing: tokens of a request become text, and a stop string ends the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from echo_trt.engine.core import EngineCore
from echo_trt.engine.params import Completion, TokenLogprobs, TokenSource
from echo_trt.engine.request import Request
from echo_trt.engine.text import TextStream


@dataclass(frozen=True)
class OutputDelta:
    """New output of a request: text, tokens, and one entry of logprobs and sources per token where they are requested.

    ``offsets``, with logprobs or sources: begin of every token's text, of tokens whose text is complete.
    """

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    offsets: Sequence[int] = ()
    sources: Sequence[TokenSource] = ()


class OutputProcessor:
    """Turns the tokens of one request into text. ``reported`` counts the tokens that ``take`` has returned."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        """Begin after the tokens that ``request`` has already: another engine has emitted them."""
        self.request, self.reported = request, len(request.generated)
        self._text = TextStream(tokenizer, request.params.stop, request.params.min_tokens)
        self._text.push(request.generated)
        self._text.settle()

    def take(self, loop: EngineCore, tokens: Sequence[int]) -> OutputDelta:
        """Take new tokens; return the text that is certain by now, and the tokens that belong to the answer.

        A stop string ends the request here. It may end inside an accepted path; the tokens after it do not count.
        """
        request, stream = self.request, self._text
        piece, used = stream.push(tokens)
        end = self.reported + used
        if stream.stopped:
            loop.scheduler.cancel(request)
            del request.generated[end:], request.logprobs[end:], request.sources[end:]
            request.finish_reason = "stop"
        if request.finish_reason:
            piece += stream.finish()
            if stream.stopped:  # the last character, complete only at the end, completed a stop string
                request.finish_reason = "stop"
        begin, self.reported = self.reported, end
        if request.params.logprobs is None and not request.params.token_sources:
            return OutputDelta(piece, tokens[:used])
        return OutputDelta(
            piece, tokens[:used], request.logprobs[begin:end], stream.settle(), request.sources[begin:end]
        )

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
