"""What of an answer's text has not been sent, whoever sends it."""

from __future__ import annotations

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import ERRORS, Event
from echo_trt.engine.text.entries import OutgoingLogprobs, OutgoingSources
from echo_trt.engine.text.prompts import PromptInput, PromptReader


class OutgoingText:
    """An answer's text from its tokens, as they come.

    ids                         the prompt's
    in_thought                  whether the prompt ends inside a thought; None for a model that does not think
    unsent, tokens              text and tokens that the sender has not taken yet
    logprobs, sources           likewise; None where the request does not ask for them
    """

    def __init__(
        self, reader: PromptReader, prompt: PromptInput, ids: list[int], params: SamplingParams, echoes: bool = False
    ):
        """``echoes``: whether the prompt's text precedes the answer's."""
        self.ids, self.in_thought = ids, reader.in_thought(ids)
        echoed = reader.echoed(prompt) if echoes else ""
        self.unsent, self.tokens = echoed, list[int]()
        self._params, self._text, self._began = params, reader.answer_text(params), False
        wanted = params.logprobs is not None or params.prompt_logprobs is not None
        self.logprobs = OutgoingLogprobs(reader.texts, echoed) if wanted else None
        self.sources = OutgoingSources(reader.texts) if params.token_sources else None

    @property
    def stopped(self) -> str:
        """The stop string that has ended it; empty: none."""
        return self._text.stopped

    @property
    def used(self) -> int:
        """Tokens of the answer, up to a stop string."""
        return self._text.used

    def add(self, event: Event) -> bool:
        """Take news; say whether they complete a stop string while the engine goes on, which must be told to stop.

        ``event`` says then how the text has it: an answer of which a stop string was the end has stopped.
        """
        before = self.stopped
        piece, used, offsets = self._text.take(event.token_ids, bool(event.reason) and event.reason != "failed")
        self.unsent += piece
        self.tokens += event.token_ids[:used]
        if self.logprobs:
            if not self._began and self._params.prompt_logprobs is not None:
                self.logprobs.begin(self.ids, event.prompt_logprobs)
            if self._params.logprobs is not None:
                self.logprobs.take(event.logprobs[:used], offsets)
        if self.sources:
            self.sources.take(event.sources[:used], offsets)
        self._began = True
        if self.stopped:
            event.completion_tokens = self.used
            event.reason = "stop" if event.reason and event.reason not in ERRORS else event.reason
        return bool(self.stopped) and not before and not event.reason

    def take(self) -> tuple[str, list[int]]:
        """Return unsent text and tokens, which are sent then."""
        taken, self.unsent, self.tokens = (self.unsent, self.tokens), "", []
        return taken
