"""The sources of an answer's tokens as JSON for clients."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from echo_trt.engine.params import TokenSource
from echo_trt.models.token_texts import TokenTexts


class OutgoingSources:
    """Collects entries of tokens whose text has come: the bytes of all entries joined are the text.

    Special tokens have no entry.
    """

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._waiting: deque[TokenSource] = deque()  # of tokens whose text has not come
        self._entries: list[dict[str, Any]] = []

    def take(self, sources: Sequence[TokenSource], offsets: Sequence[int]) -> None:
        """Take the sources of new tokens, and the offsets of tokens whose text has come (``engine.request.Event``)."""
        self._waiting.extend(sources)
        for _ in offsets:
            each = self._waiting.popleft()
            if not self._texts.is_special(each.token):
                raw = self._texts.raw(each.token)
                chance = None if each.probability is None else round(each.probability, 4)
                text = raw.decode("utf-8", "backslashreplace")
                self._entries.append({"token": text, "bytes": list(raw), "source": each.source, "probability": chance})

    def clear(self) -> str:
        entries, self._entries = self._entries, []
        return json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
