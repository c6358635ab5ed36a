"""One policy's answers to prompts, on a clock of their own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from echo_trt.cli.generate import summary
from echo_trt.engine.core import EngineCore
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, Delta, SamplingParams
from echo_trt_lab.sourced_text import SourcedText


@dataclass
class Side:
    """One policy's part: its answers, and seconds on a clock that stands still while the other side runs.

    loop      of ``LLM.side_by_side``; None: the LLM's own, in which sides run one after another
    ended     id -> seconds from the round's begin to the answer's end
    """

    policy: str
    loop: EngineCore | None = None
    seconds: float = 0.0
    completions: dict[str, Completion] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    verifications: int = 0
    emitted: int = 0
    texts: list[SourcedText] = field(default_factory=list)
    begun: float = 0.0
    busy: bool = False
    _rounds: list[list[SourcedText]] = field(default_factory=list)

    def begin(self, llm: LLM, ids: Sequence[str], prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Begin a round: answers to ``prompts``, all at once."""
        loop = self.loop or llm.loop
        self._ids, self._loop, self._deltas = ids, loop, self._counted(loop, llm.stream(prompts, params, loop))
        self.texts, self.begun, self.busy = [SourcedText() for _ in ids], self.seconds, True
        self._rounds.append(self.texts)

    def run(self, seconds: float, show: Callable[[Delta], None]) -> None:
        """Run for ``seconds``, at least until the next piece of text, or to the round's end.

        ``show`` gets every piece of text; its time is not on the clock.
        """
        end = self.seconds + seconds
        while self.busy:
            before = time.perf_counter()
            delta = next(self._deltas, None)
            self.seconds += time.perf_counter() - before
            self.busy = delta is not None
            if delta is not None:
                self.texts[delta.index].add(delta)
                if delta.completion:
                    name = self._ids[delta.index]
                    self.completions[name], self.ended[name] = delta.completion, self.seconds - self.begun
                show(delta)
            if self.seconds >= end:
                break

    def _counted(self, loop: EngineCore, deltas: Iterator[Delta]) -> Iterator[Delta]:
        counters = loop.counters
        before = counters.verifications, counters.emitted_tokens
        yield from deltas
        self.verifications += counters.verifications - before[0]
        self.emitted += counters.emitted_tokens - before[1]

    @property
    def tokens(self) -> int:
        return sum(text.counts.total() for text in self.texts)

    @property
    def counts(self) -> Counter[str]:
        """Tokens of all rounds by their source, where requests ask for them."""
        return sum((text.counts for texts in self._rounds for text in texts), Counter())

    def summary(self) -> dict[str, Any]:
        return summary(self.policy, self.completions.values(), self.seconds, self.verifications, self.emitted)
