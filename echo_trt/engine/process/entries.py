"""Log-probabilities and sources of an answer's tokens on their way out: as entries of OpenAI's API in JSON."""

from __future__ import annotations

import codecs
import json
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from echo_trt.engine.params import TokenLogprobs, TokenSource
from echo_trt.models.token_texts import TokenTexts

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot write
#: A prompt's tokens whose entries are written before Python's lock is let go of; larger: the engine's thread, which
#: asks for it several times per iteration, waits longer.
TOGETHER = 8


class OutgoingLogprobs:
    """``numbers`` are those of answers' tokens taken since the last ``clear``; ``total`` is the sum of all."""

    def __init__(self, texts: TokenTexts, echoed: str = ""):
        """``echoed``: text that precedes the answer."""
        self._texts, self._echoed = texts, echoed
        self._waiting: deque[TokenLogprobs] = deque()  # their text has not come
        self.numbers: list[float] = []
        self.total = 0.0
        self._entries: list[str] = []

    def begin(self, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Put the prompt's tokens before the answer's.

        The first token has no log-probability, nor have those that were not computed before an early end.
        """
        offsets = prompt_offsets(prompt, self._texts, self._echoed)
        for position, (token, offset) in enumerate(zip(prompt, offsets, strict=True)):
            if position % TOGETHER == 0:
                time.sleep(0.0001)
            if 1 <= position <= len(logprobs):
                self._add(token, logprobs[position - 1].logprob, logprobs[position - 1].top, offset)
            else:
                self._add(token, None, (), offset)

    def take(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> None:
        """As an event brings them (``engine.request.Event``)."""
        new = [each.logprob for each in logprobs]
        self.numbers += new
        self.total += sum(new)
        self._waiting.extend(logprobs)
        for offset in offsets:
            each = self._waiting.popleft()
            if not self._texts.is_special(each.token):
                self._add(each.token, each.logprob, each.top, len(self._echoed) + offset)

    def clear(self) -> str:
        """JSON of the entries since the last call: tokens whose text has come, so their bytes joined are the text."""
        content, self._entries, self.numbers = self._entries, [], []
        return f"[{','.join(content)}]"

    def _add(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int) -> None:
        best = ",".join([self._entry(*each) + "}" for each in top])
        self._entries.append(f'{self._entry(token, logprob)},"top_logprobs":[{best}],"text_offset":{offset}}}')

    def _entry(self, token: int, logprob: float | None) -> str:
        """Write an object but for its closing brace: a prompt may have 100,000 of them, which dictionaries delay."""
        name, raw = self._texts.in_json(token)
        number = "null" if logprob is None else repr(round(max(_LOWEST, logprob), 6))
        return f'{{"token":{name},"logprob":{number},"bytes":{raw}'


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


def prompt_offsets(prompt: Sequence[int], texts: TokenTexts, echoed: str) -> list[int]:
    """Where the text of each token of a prompt begins in ``echoed``, the prompt's text as its client sees it.

    A special token takes room where the client wrote its name. Bytes that are no character are U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    begins, pieces, length = [], [], 0
    for token in prompt:
        begins.append(length)
        if texts.is_special(token):
            continue
        raw, waiting = texts.raw(token), bool(decoder.getstate()[0])
        pieces.append(decoder.decode(raw))
        own = raw.decode("utf-8", "replace")
        if waiting and "\ufffd" not in own and pieces[-1].endswith(own):  # what waited has come to nothing
            begins[-1] += len(pieces[-1]) - len(own)
        length += len(pieces[-1])
    text = "".join([*pieces, decoder.decode(b"", True)])
    shift = -1 if text.startswith(" ") and not echoed.startswith(" ") else 0  # SentencePiece's mark of a beginning
    names = text[-shift:] != echoed
    for position, token in enumerate(prompt):
        begins[position] = min(max(begins[position] + shift, 0), len(echoed))
        name = texts.raw(token).decode() if names and texts.is_special(token) else ""
        shift += len(name) if name and echoed.startswith(name, begins[position]) else 0
    return begins
