"""The state of a text under a grammar: which tokens are allowed next, and which are forced.

States do not change: ``after`` makes the next one, and remembers it. So drafting and verifying share what was computed,
a tree has a state for each node along its own path, and nothing is rolled back. A state keeps all later states alive,
and every state has a parser whose size grows with the text. So keep only the newest state of a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from echo_trt.grammar.layout import Writer

if TYPE_CHECKING:  # decoding without grammars needs no llguidance
    from llguidance import LLMatcher

#: Seconds of CPU that a grammar may take per token, on average. Larger: one costly grammar slows other requests more.
#: Common schemas take less than 0.4 ms, drafts included.
PER_TOKEN_S = 0.005
AT_ONCE_S = 0.05  # seconds that it may save up; larger: longer pauses of other requests
AT_END = 4  # tokens from a mark of a thought to the end of a prompt, at most: the mark and line breaks


@dataclass(frozen=True)
class ReasoningState:
    """A reasoning model's thought, which no grammar constrains.

    opens, closes  token ids of the marks around it, <think> and </think>
    inside         whether the text is in it; else the next token may open it
    left           tokens that it may still take; None: no limit
    """

    opens: int
    closes: int
    inside: bool
    left: int | None = None

    @classmethod
    def following(cls, prompt: Sequence[int], opens: int, closes: int, left: int | None) -> ReasoningState | None:
        """Return the thought that a prompt leaves open, or that may begin behind it; None: its end has a closed one.

        A template that asks for no thought ends with an empty thought. Earlier marks belong to a message.
        """
        mark = next((token for token in reversed(prompt[-AT_END:]) if token in (opens, closes)), None)
        return None if mark == closes else cls(opens, closes, mark == opens, left)

    def after(self, token: int) -> ReasoningState | None:
        """Return the thought behind its ``token``; None: it is over."""
        if token == self.closes:
            return None
        if not self.inside:
            return replace(self, inside=True)
        return self if self.left is None else replace(self, left=self.left - 1)

    @property
    def spent(self) -> bool:
        """Whether it must close now."""
        return self.inside and self.left == 0


class GrammarFailed(Exception):
    """A text cannot go on under its grammar, for instance since that is too complex there. The message is a clause."""


class Allowance:
    """The CPU time that one text's grammar may still take, drafts included; the engine's one thread works for all."""

    def __init__(self) -> None:
        self._left, self._furthest = AT_ONCE_S, 0

    @contextmanager
    def spend(self, position: int) -> Iterator[None]:
        """Count the time of work at a ``position`` of the text; raises GrammarFailed where all has been spent before.

        Time is earned by tokens that nobody has looked behind yet, so a rejected draft earns none twice.
        """
        earned = PER_TOKEN_S * max(position - self._furthest, 0)
        self._left, self._furthest = min(self._left + earned, AT_ONCE_S), max(position, self._furthest)
        if self._left < 0:
            raise GrammarFailed("it costs too much")
        begin = time.thread_time()
        try:
            yield
        finally:
            self._left -= time.thread_time() - begin


@dataclass(frozen=True)
class Vocabulary:
    """A target's tokens.

    vocab_size  the width of its logits
    ends        ids that end a text
    spell       spells a text in tokens that are not added ones; None: before the first grammar
    """

    vocab_size: int
    ends: tuple[int, ...]
    spell: Callable[[str], list[int]] | None = None

    def bits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return a mask of these tokens alone: uint8 [ceil(vocab_size / 8)], the first token in the lowest bit."""
        bits = np.zeros(-(-self.vocab_size // 8), np.uint8)
        for token in tokens:
            bits[token >> 3] |= 1 << (token & 7)
        return bits


@dataclass(eq=False, repr=False)
class State:
    """What may follow a text. Made by ``Compiler.begin`` and ``after``.

    free       decides what is allowed; None: everything is, once the thought is over
    writer     proposes what must follow in JSON; None: ``free`` does
    unseen     tokens of the text that ``writer`` has not seen yet
    ended      whether the text has ended
    allowance  CPU time of all states of one text
    position   tokens of the text that ``free`` has seen
    """

    tokens: Vocabulary
    free: LLMatcher | None
    writer: Writer | None = None
    reasoning: ReasoningState | None = None
    unseen: tuple[int, ...] = ()
    ended: bool = False
    allowance: Allowance = field(default_factory=Allowance)
    position: int = 0
    _after: dict[int, State | None] = field(default_factory=dict, init=False)

    def after(self, token: int) -> State | None:
        """Return the state behind ``token``; None where it is forbidden. Raises GrammarFailed."""
        if self.ended:
            return self
        if token not in self._after:
            self._after[token] = self._next(token)
        return self._after[token]

    def _next(self, token: int) -> State | None:
        reasoning, tokens, ends = self.reasoning, self.tokens, token in self.tokens.ends
        if reasoning and (reasoning.inside or token == reasoning.opens):
            if (reasoning.spent and token != reasoning.closes) or (ends and self.free):
                return None
            return replace(self, reasoning=reasoning.after(token), ended=ends)
        if self.free is None:
            return State(tokens, None, ended=ends)
        if ends and self.free.is_accepting():
            return State(tokens, self.free, ended=True)
        with self.allowance.spend(self.position):
            free = self.free.deep_copy()
            if not free.try_consume_tokens([token]):
                _check(free)
                return None
        unseen, position = (*self.unseen, token), self.position + 1
        return State(tokens, free, self.writer, None, unseen, ends, self.allowance, position)

    @cached_property
    def mask(self) -> np.ndarray | None:
        """Allowed tokens, as ``Vocabulary.bits``. None: all are. Raises GrammarFailed."""
        reasoning, tokens = self.reasoning, self.tokens
        if reasoning and reasoning.spent:
            return tokens.bits([reasoning.closes])
        if self.ended or self.free is None:
            return None
        if reasoning and reasoning.inside:
            return ~tokens.bits(tokens.ends)
        with self.allowance.spend(self.position):
            mask = np.frombuffer(self.free.compute_bitmask(), np.uint8)[: -(-tokens.vocab_size // 8)]
        _check(self.free)
        if np.count_nonzero(mask) == 1 and tokens.spell:
            # llguidance forces the name of an added token as that token, which it then refuses: no text writes it.
            only = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
            if not any(self.free.validate_tokens([token]) for token in only) and (
                forced := self.free.compute_ff_bytes().decode("utf-8", "ignore")
            ):
                mask = tokens.bits(tokens.spell(forced)[:1])
        return mask | tokens.bits([reasoning.opens]) if reasoning else mask

    def allowed(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each of ``tokens`` int64 [n] may follow: bool [n]. Raises GrammarFailed."""
        if self.mask is None:
            return np.ones(len(tokens), bool)
        allowed: np.ndarray = (self.mask[tokens >> 3] >> (tokens & 7) & 1).astype(bool)
        return allowed

    def forced(self, max_tokens: int) -> list[int]:
        """Return up to ``max_tokens`` tokens that the grammar forces, as a tokenizer writes them.

        They are a likely draft and no certain one: other tokens may spell the same text, or lay it out otherwise.
        Raises GrammarFailed.
        """
        reasoning = self.reasoning
        if reasoning and reasoning.inside:
            return [reasoning.closes] if reasoning.spent else []
        if self.ended or self.free is None:
            return []
        with self.allowance.spend(self.position):
            if self.writer and self.unseen:
                self.writer, self.unseen = self.writer.following(list(self.unseen)), ()
            if self.free.is_stopped() or (self.writer and self.writer.complete):
                return list(self.tokens.ends[:1]) if self.free.is_accepting() else []
            tokens = self.writer.forced(max_tokens) if self.writer else self.free.compute_ff_tokens()[:max_tokens]
            return tokens[: self.free.validate_tokens(tokens)]


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarFailed(" ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:200])
