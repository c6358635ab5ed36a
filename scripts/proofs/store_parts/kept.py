"""What the proofs of a store share: prompts, and an LLM in this process whose store is opened again and again."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.stored_prefixes import StoredPrefixes, keep_prefixes

ROOT = Path(__file__).resolve().parents[3]
SHORT, ANSWER = 600, 12  # tokens of a prompt and of its answer where many are asked
GREEDY = SamplingParams(max_tokens=ANSWER, ignore_eos=True)

#: What was measured, the figure, and whether it is within its bound.
Row = tuple[str, str, bool]


@cache
def _docs(bundle: Path) -> list[int]:
    text = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("docs/**/*.md")))
    ids: list[int] = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


def prompts(bundle: Path, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Return pieces of docs/ as token ids, of which no two begin alike."""
    ids, draw = _docs(bundle), random.Random(seed)
    return [ids[begin : begin + tokens] for begin in draw.sample(range(len(ids) - tokens), count)]


class Kept:
    """An LLM in this process, with a store in a folder; ``reopen`` is a restart."""

    def __init__(self, bundle: Path, folder: Path, size: str = "20G", policy: str | None = None):
        self.llm, self._folder, self._size = LLM(bundle, policy, batch=8), folder, size
        self.prefixes: StoredPrefixes | None = None
        self.reopen()

    def reopen(self) -> StoredPrefixes:
        self.close()
        self.llm.loop.batch.blocks.forget_cached()
        self.prefixes = keep_prefixes(self.llm, self._folder, self._size)
        if not self.prefixes:
            raise SystemExit("the store cannot be used; see the log.")
        return self.prefixes

    def close(self) -> None:
        if self.prefixes:
            self.prefixes.close()
        self.prefixes = None

    def answer(self, ids: Sequence[int], tokens: int = ANSWER) -> list[int]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return self.llm.generate([ids], params)[0].token_ids

    def first(self, ids: Sequence[int]) -> float:
        begin = time.perf_counter()
        self.answer(ids, 1)
        return time.perf_counter() - begin
