"""The engine's complaints in the client's words: its tensors have other names than the fields they came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Fields that have one name everywhere.
SHARED = frozenset({"messages", "tools", "chat_template_kwargs", "thinking_token_budget", "min_tokens", "logit_bias"})
_GRAMMAR_LINE = re.compile(r"\(at (\d+)\(\d+\): failed to compile JSON schema: (.*?) \d+ \| .*\);", re.DOTALL)


@dataclass(frozen=True)
class Names:
    """
    prompt   the field that holds the prompt
    fields   engine's name -> client's
    lines    of a grammar that was made here: line, counted from 1 -> the client's field that it came from
    """

    prompt: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[int, str] = field(default_factory=dict)

    def told(self, sentence: str) -> tuple[str, str | None]:
        """The sentence, and the field that it is about."""
        name, _, rest = sentence.partition(" ")
        if name in self.fields:
            if self.lines and (found := _GRAMMAR_LINE.search(rest)):
                place = self.lines.get(int(found[1]), self.fields[name])
                return f"{place} {rest.replace(found[0], f'({found[2]});')}", place
            return f"{self.fields[name]} {rest}", self.fields[name]
        return sentence, name if name.partition(".")[0] in SHARED else None
