"""Log-probabilities of an answer's tokens on their way out: as numbers, and as the entries of OpenAI's API in JSON."""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from echo_trt.models.token_texts import TokenTexts
from echo_trt.runtime.params import TokenLogprobs

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot write


class Outgoing:
    """``numbers`` are those of answers' tokens taken since the last ``clear``; ``total`` is the sum of all."""

    def __init__(self, texts: TokenTexts, echoed: str = ""):
        """``echoed``: text that precedes the answer."""
        self._texts, self._echoed = texts, echoed
        self._waiting: deque[TokenLogprobs] = deque()  # their text has not come
        self.numbers: list[float] = []
        self.total = 0.0
        self._entries: list[dict[str, Any]] = []

    def begin(self, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Put the prompt's tokens before the answer's; the first has no log-probability."""
        decoder, text = codecs.getincrementaldecoder("utf-8")("ignore"), ""
        for place, token in enumerate(prompt):
            known = logprobs[place - 1] if place else None
            top = [self._entry(best, logprob) for best, logprob in known.top] if known else []
            entry = self._entry(token, known.logprob if known else None)
            self._entries.append({**entry, "top_logprobs": top, "text_offset": len(text)})
            text += decoder.decode(self._texts.raw(token))

    def take(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> None:
        """As an event brings them (``runtime.answer.Said``)."""
        new = [each.logprob for each in logprobs]
        self.numbers += new
        self.total += sum(new)
        self._waiting.extend(logprobs)
        for offset in offsets:
            each = self._waiting.popleft()
            if not self._texts.is_special(each.token):
                top = [self._entry(token, logprob) for token, logprob in each.top]
                entry = self._entry(each.token, each.logprob)
                self._entries.append({**entry, "top_logprobs": top, "text_offset": len(self._echoed) + offset})

    def clear(self) -> str:
        """JSON of the entries since the last call: tokens whose text has come, so their bytes joined are the text."""
        content, self._entries, self.numbers = self._entries, [], []
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._texts.raw(token)
        text = raw.decode("utf-8", "backslashreplace")
        number = None if logprob is None else round(max(logprob, _LOWEST), 6)
        return {"token": text, "logprob": number, "bytes": list(raw)}
