"""Log-probabilities of an answer's tokens on their way out: as numbers, and as the entries of OpenAI's API in JSON."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from echo_trt.models.token_texts import TokenTexts
from echo_trt.runtime.params import TokenLogprobs

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot write


class Outgoing:
    """``numbers`` are those of tokens taken since the last ``clear``; ``total`` is the sum of all."""

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._waiting: deque[TokenLogprobs] = deque()  # their text has not come
        self.numbers: list[float] = []
        self.total = 0.0
        self._entries: list[dict[str, Any]] = []

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
                self._entries.append({**entry, "top_logprobs": top, "text_offset": offset})

    def clear(self) -> str:
        """JSON of the entries since the last call: tokens whose text has come, so their bytes joined are the text."""
        content, self._entries, self.numbers = self._entries, [], []
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.raw(token)
        text = raw.decode("utf-8", "backslashreplace")
        return {"token": text, "logprob": round(max(logprob, _LOWEST), 6), "bytes": list(raw)}
