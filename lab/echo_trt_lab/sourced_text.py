"""Text in a terminal, coloured by who proposed its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

from rich.style import Style
from rich.text import Text

from echo_trt.engine.params import Delta
from echo_trt.speculation.sources import DRAFT_SOURCES, TARGET

#: Source -> its name for readers, in the order of the legend.
NAMES = {source.name: source.label for source in (TARGET, *DRAFT_SOURCES)}
#: Line of the live page -> what stands for it here: nothing is told by colour alone.
LINES = {"dashed": Style(underline=True), "double": Style(underline=True, bold=True), "dotted": Style(italic=True)}
STYLES = {TARGET.name: Style()} | {
    each.name: LINES.get(each.line, Style(bold=each.thickness > 0 or None)) + Style(color=each.colour)
    for each in DRAFT_SOURCES
}

#: Characters that would move a terminal's cursor, change its state or hide -> their pictures; lines stay lines.
HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
HARMLESS |= dict.fromkeys((*range(128, 160), *range(8234, 8239), *range(8294, 8298), 65534, 65535), 65533)


class SourcedText:
    """A text as it grows, with the source of each of its tokens."""

    def __init__(self) -> None:
        self.text = ""
        self._begins: list[int] = []
        self._sources: list[str] = []

    @property
    def counts(self) -> Counter[str]:
        return Counter(self._sources)

    def add(self, delta: Delta) -> Text:
        """Take what was said next; return its text, in the colours of its sources."""
        begin = len(self.text)
        self.text += delta.text
        self._begins += delta.begins
        self._sources += [entry.source for entry in delta.sources]
        return self.styled(begin)

    def styled(self, begin: int = 0, harmless: bool = False) -> Text:
        """Return the text from the character ``begin``; ``harmless``: with pictures of control characters."""
        styled, index = Text(), max(bisect_right(self._begins, begin) - 1, 0)
        while begin < len(self.text):
            index += 1
            end = self._begins[index] if index < len(self._begins) else len(self.text)
            source = self._sources[index - 1] if index <= len(self._sources) else "target"
            piece = self.text[begin:end]
            styled.append(piece.translate(HARMLESS) if harmless else piece, STYLES[source])
            begin = max(begin, end)
        return styled


def legend(counts: Counter[str]) -> Text:
    """Return one line: each source that occurs, in its colour, with its share of the tokens."""
    line, total = Text("tokens from: "), max(counts.total(), 1)
    for name, label in NAMES.items():
        if counts[name]:
            line.append(f"{label} {counts[name] / total:.0%}", STYLES[name])
            line.append("  ")
    line.rstrip()
    return line
