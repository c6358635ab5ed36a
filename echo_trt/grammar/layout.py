"""How a model lays out JSON, so that what a schema forces is drafted as the model would write it.

A grammar with free white space forces little: after ``"Dune",`` a line break, a space or a quote may follow. So a
second grammar without white space reads the text without white space. What the second grammar forces is laid out with
the line breaks, indentation and spaces of the answer so far, or of the answer before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # decoding without grammars needs no llguidance
    from llguidance import LLMatcher, LLTokenizer

_SPACE = b" \t\r\n"
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPEN, _CLOSE = b"{[", b"}]"
_TOKEN = 8  # bytes of a token; larger: more of a long forced text is looked at in each step
_PROBES = (b"a", b"1")  # what may follow a draft: where they change its last tokens, those are left out


@dataclass(frozen=True)
class Style:
    """What stands between the tokens of JSON.

    indent    spaces a level, on lines of their own
    lines     whether a container has a line for each entry: by (depth, bracket), and by (0, bracket) of the latest
    colon     white space behind a colon
    comma     white space behind a comma, in containers on one line
    """

    indent: int = 2
    lines: Mapping[tuple[int, int], bool] = field(default_factory=dict)
    colon: bytes = b" "
    comma: bytes = b" "


@dataclass(frozen=True)
class Position:
    """Where a JSON text ends: its open containers, the last character outside strings, and the space behind it."""

    open: bytes = b""
    last: int = 0
    gap: bytes = b""
    in_string: bool = False
    escaped: bool = False

    def following(self, byte: int) -> Position:
        """Return the position after one more byte."""
        if self.in_string:
            closes = byte == _QUOTE and not self.escaped
            return replace(self, in_string=not closes, escaped=byte == _BACKSLASH and not self.escaped)
        if byte in _SPACE:
            return replace(self, gap=self.gap + bytes([byte]))
        inside = self.open + bytes([byte]) if byte in _OPEN else self.open[:-1] if byte in _CLOSE else self.open
        return Position(inside, byte, in_string=byte == _QUOTE)

    def learn(self, byte: int, style: Style) -> Style:
        """Learn the style from the white space before ``byte``, the next character outside strings."""
        lines = b"\n" in self.gap
        if self.last in _OPEN and byte not in _CLOSE:
            kinds = {(len(self.open), self.last): lines, (0, self.last): lines}
            style = replace(style, lines={**style.lines, **kinds})
            if lines:
                style = replace(style, indent=len(self.gap.rpartition(b"\n")[2]) // len(self.open))
        elif self.last == ord(":"):
            style = replace(style, colon=self.gap)
        elif self.last == ord(",") and not lines:
            style = replace(style, comma=self.gap)
        return style

    def gap_before(self, byte: int, style: Style) -> bytes:
        """Return the white space that the style puts before ``byte``; 0 stands for any value or key."""
        closes, opened, depth = byte in _CLOSE, self.last in _OPEN, len(self.open)
        if self.last == ord(":"):
            return style.colon
        if not self.open or (opened and closes) or not (opened or closes or self.last == ord(",")):
            return b""
        bracket = self.open[-1]
        if style.lines.get((depth, bracket), style.lines.get((0, bracket), False)):
            return b"\n" + b" " * (style.indent * (depth - 1 if closes else depth))
        return style.comma if self.last == ord(",") else b""


class Layouts:
    """The style of the latest answers, in which the next one is expected to begin."""

    def __init__(self, tokenizer: LLTokenizer):
        self.tokenizer, self.style = tokenizer, Style()


class Writer:
    """A JSON text, how it is laid out, and what must follow. It does not change."""

    def __init__(self, layouts: Layouts, bare: LLMatcher, index: Position | None = None, style: Style | None = None):
        """``bare``: the grammar without white space, behind the text without white space."""
        self._layouts, self._bare = layouts, bare
        self._index, self._style = index or Position(), style

    def following(self, tokens: list[int]) -> Writer | None:
        """Return the writer behind these tokens; None where the grammar without white space has no such text."""
        index, style, kept = self._index, self._style or self._layouts.style, bytearray()
        for byte in self._layouts.tokenizer.decode_bytes(tokens):
            if not index.in_string and byte not in _SPACE:
                style = index.learn(byte, style)
            if index.in_string or byte not in _SPACE:
                kept.append(byte)
            index = index.following(byte)
        self._layouts.style = style
        bare = self._bare.deep_copy()
        text = self._layouts.tokenizer.tokenize_bytes(bytes(kept))
        if bare.try_consume_tokens(text) < len(text):
            return None
        return Writer(self._layouts, bare, index, style)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._bare.is_stopped()

    def forced(self, max_tokens: int) -> list[int]:
        """Up to ``max_tokens`` tokens of what must follow; the end is one of them."""
        forced = self._bare.compute_ff_bytes()
        if not forced:
            return []
        tokenizer, enough = self._layouts.tokenizer, forced[: _TOKEN * max_tokens]
        text = self._laid_out(enough)
        tokens: list[int] = tokenizer.tokenize_bytes(text)
        if len(enough) < len(forced):
            return tokens[:-1][:max_tokens]
        for probe in _PROBES:
            other = tokenizer.tokenize_bytes(text + probe)
            same = [a == b for a, b in zip(tokens, other, strict=False)]
            tokens = tokens[: same.index(False)] if False in same else tokens[: len(same)]
        return tokens[:max_tokens]

    def _laid_out(self, forced: bytes) -> bytes:
        index, style, text = self._index, self._style or self._layouts.style, bytearray()
        for byte in forced:
            if not index.in_string:
                text += self._rest(index, byte, style)
                index = replace(index, gap=b"")
            text.append(byte)
            index = index.following(byte)
        if not index.in_string and index.last in b":,":
            text += self._rest(index, 0, style)
        return bytes(text)

    @staticmethod
    def _rest(index: Position, byte: int, style: Style) -> bytes:
        """White space that is missing before ``byte``: none where the text has another one already."""
        gap = index.gap_before(byte, style)
        return gap[len(index.gap) :] if gap.startswith(index.gap) else b""
