"""How large the runtime's calls of an engine are: what it is compiled for, and what its memory has to hold."""

from __future__ import annotations

from dataclasses import dataclass

from echo_trt.bundle.recipe import Recipe
from echo_trt.decoding.pack import BLOCK
from echo_trt.decoding.policies import reserve_for

#: Rows of logits that one call returns at most; a larger one is divided. At 150,000 tokens they are 300 MB.
MOST_ROWS = 1024


@dataclass(frozen=True)
class CallSizes:
    """What the runtime asks of an engine. ``batch`` requests of ``blocks`` KV blocks each, and of each in one call
    ``tree`` tokens beside the others, or ``chunk`` tokens alone; ``pool`` KV blocks in all."""

    batch: int
    blocks: int
    tree: int
    chunk: int
    pool: int

    @classmethod
    def of(cls, recipe: Recipe) -> CallSizes:
        limits, reserve = recipe.limits, reserve_for(recipe.decoding.model_dump())
        blocks = -(-(limits.context + reserve) // BLOCK)
        tree = max(reserve, 8)  # 8: the self-check's
        pool = limits.kv_blocks or limits.batch * blocks
        return cls(limits.batch, blocks, tree, max(limits.prefill_chunk, tree), pool)

    @property
    def cache_rows(self) -> int:
        """C of a linear cache: a request's blocks and, behind them, room for one call's tokens."""
        return self.blocks * BLOCK + self.chunk

    @property
    def rows(self) -> int:
        """Rows of logits that one short call may ask for."""
        return min(self.batch * self.tree, max(MOST_ROWS, self.tree))
