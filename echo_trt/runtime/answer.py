"""A request's answer as it grows: what the loop emits for it becomes text, and a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from echo_trt.runtime.loop import Loop, Request
from echo_trt.runtime.params import Completion
from echo_trt.runtime.text import TextStream


class Answer:
    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request = request
        self._text = TextStream(tokenizer, request.params.stop)

    def take(self, loop: Loop, tokens: Sequence[int]) -> tuple[str, Sequence[int]]:
        """Returns the text that became certain, all of it once the request has ended, and those tokens that count.

        A stop string ends the request here; it may end inside an accepted path, and what follows it was never said.
        """
        request, stream = self.request, self._text
        piece, used = stream.push(tokens)
        if stream.stopped:
            loop.cancel(request)
            del request.generated[len(request.generated) - (len(tokens) - used) :]
            request.finish_reason = "stop"
        if request.finish_reason:
            piece += stream.finish()
        return piece, tokens[:used]

    def completion(self) -> Completion:
        request = self.request
        accepted = len(request.generated) / max(request.verifications, 1)
        return Completion(self._text.text, request.generated, request.finish_reason, accepted, len(request.prompt))
