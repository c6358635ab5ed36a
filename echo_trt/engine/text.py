"""Tokens to text as they come: whole characters only, and stop strings wherever they begin and end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextStream:
    """One request's text. ``text`` has been emitted; a possible beginning of a stop string is held back.

    Stop strings that are complete before ``min_tokens`` are text like any other. ``stopped`` is the one that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
        from tokenizers.decoders import DecodeStream  # a machine that measures a card may have no tokenizers

        self._tokenizer, self._stop, self._min_tokens = tokenizer, tuple(stop), min_tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._begins: list[int] = []  # of each token's text
        self._settled = 0
        self._decoded = ""
        self.text = ""
        self.stopped = ""

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the text that became certain and how many tokens were used: fewer once a stop string is complete."""
        for used, token in enumerate(tokens, 1):
            self._tokens.append(token)
            self._begins.append(len(self._decoded))
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                self._begins[-1] += self._before_own(piece)
                self._extend(piece)
                if self.stopped:
                    return self._give_out(len(self._decoded)), used
        held_back = max((overlap(self._decoded, stop) for stop in self._stop), default=0)
        return self._give_out(len(self._decoded) - held_back), len(tokens)

    def finish(self) -> str:
        """Whatever was held back; bytes that never became a character come as U+FFFD."""
        if not self.stopped:
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if whole.startswith(self._decoded):
                self._extend(whole[len(self._decoded) :])
        return self._give_out(len(self._decoded))

    def settle(self) -> list[int]:
        """Where the text of each next token begins, for those whose text was first given out since the last call.

        Tokens whose text a stop string cuts off are never among them.
        """
        before, self._settled = self._settled, bisect_left(self._begins, len(self.text))
        return self._begins[before : self._settled]

    def _before_own(self, piece: str) -> int:
        """Return how much of ``piece`` belongs to earlier tokens: bytes that were no whole character until now."""
        if self._begins[-2:-1] != self._begins[-1:]:  # none was waiting
            return 0
        own = self._tokenizer.decode(self._tokens[-1:], skip_special_tokens=True)
        return 0 if "\ufffd" in own or not piece.endswith(own) else len(piece) - len(own)

    def _extend(self, piece: str) -> None:
        """Append what was decoded, up to the first stop string that it completes."""
        before = len(self._decoded)
        self._decoded += piece
        if len(self._tokens) < self._min_tokens:
            return
        found = [(p, s) for s in self._stop if (p := self._decoded.find(s, max(before - len(s) + 1, 0))) >= 0]
        if found:
            end, self.stopped = min(found)
            self._decoded = self._decoded[:end]

    def _give_out(self, end: int) -> str:
        new = self._decoded[len(self.text) : end]
        self.text += new
        return new


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``mark``."""
    begin = text.find(mark[0], max(len(text) - len(mark) + 1, 0))
    while begin >= 0 and not mark.startswith(text[begin:]):
        begin = text.find(mark[0], begin + 1)
    return len(text) - begin if begin >= 0 else 0
