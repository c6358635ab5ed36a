"""Log-probabilities and sources of an answer's tokens on their way out."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echo_trt.engine.params import TokenLogprobs, TokenSource

if TYPE_CHECKING:
    from echo_trt.models.token_texts import TokenTexts

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot write


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """A token of an answer or of an echoed prompt, by the bytes that it adds to the text.

    logprob  natural logarithm; None: a prompt's first token has none
    top      bytes and log-probabilities of the best tokens at its position, best first
    offset   where its text begins, in characters of the whole text
    """

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """Who proposed a token (``TokenSource``), by the bytes that the token adds to the text."""

    token: bytes
    source: str
    probability: float | None


class OutgoingLogprobs:
    """``numbers`` are those of answers' tokens taken since the last ``clear``; ``total`` is the sum of all."""

    def __init__(self, texts: TokenTexts, echoed: str = ""):
        """``echoed``: text that precedes the answer."""
        self._texts, self._echoed = texts, echoed
        self._waiting: deque[TokenLogprobs] = deque()  # their text has not come
        self.numbers: list[float] = []
        self.total = 0.0
        self._entries: list[LogprobEntry] = []

    def begin(self, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Put the prompt's tokens before the answer's.

        The first token has no log-probability, nor have those that were not computed before an early end.
        """
        offsets = prompt_offsets(prompt, self._texts, self._echoed)
        for position, (token, offset) in enumerate(zip(prompt, offsets, strict=True)):
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

    def clear(self) -> list[LogprobEntry]:
        """Return entries since the last call: of tokens whose text has come, so their bytes joined are the text."""
        entries, self._entries, self.numbers = self._entries, [], []
        return entries

    def _add(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int) -> None:
        raw, number = self._texts.raw, None if logprob is None else _shown(logprob)
        best = [(raw(each), _shown(value)) for each, value in top]
        self._entries.append(LogprobEntry(raw(token), number, best, offset))


class OutgoingSources:
    """Collects entries of tokens whose text has come: the bytes of all entries joined are the text.

    Special tokens have no entry.
    """

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._waiting: deque[TokenSource] = deque()  # of tokens whose text has not come
        self._entries: list[SourceEntry] = []

    def take(self, sources: Sequence[TokenSource], offsets: Sequence[int]) -> None:
        """Take the sources of new tokens, and the offsets of tokens whose text has come (``engine.request.Event``)."""
        self._waiting.extend(sources)
        for _ in offsets:
            each = self._waiting.popleft()
            if not self._texts.is_special(each.token):
                chance = None if each.probability is None else round(each.probability, 4)
                self._entries.append(SourceEntry(self._texts.raw(each.token), each.source, chance))

    def clear(self) -> list[SourceEntry]:
        entries, self._entries = self._entries, []
        return entries


def logprob_object(entry: LogprobEntry) -> dict[str, Any]:
    """Return an entry as OpenAI's API has it, and its ``text_offset``."""
    best = [_token(*each) for each in entry.top]
    return {**_token(entry.token, entry.logprob), "top_logprobs": best, "text_offset": entry.offset}


def source_object(entry: SourceEntry) -> Any:
    """Return an entry as answers have it."""
    text = entry.token.decode("utf-8", "backslashreplace")
    return {"token": text, "bytes": list(entry.token), "source": entry.source, "probability": entry.probability}


def _token(raw: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "backslashreplace"), "logprob": logprob, "bytes": list(raw)}


def _shown(logprob: float) -> float:
    return round(max(_LOWEST, logprob), 6)


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
