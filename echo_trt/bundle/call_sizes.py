"""The sizes of the runtime's calls of an engine: it is compiled for them, and its memory has to hold them."""

from __future__ import annotations

from dataclasses import dataclass

from echo_trt.bundle.recipe import Recipe
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import reserve_for

#: The most rows of logits in one call; a larger call is divided. Larger: fewer calls, more memory. At 150,000 tokens
#: of vocabulary 1,024 rows take 300 MB.
MAX_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class CallSizes:
    """The largest calls that the runtime makes.

    batch   requests in one call
    blocks  KV blocks of one request
    tree    tokens of one request in a call with others
    chunk   tokens of one request in a call of its own
    pool    KV blocks of all requests
    """

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
    def rows(self) -> int:
        """The most rows of logits that one call of trees asks for."""
        return min(self.batch * self.tree, max(MAX_LOGIT_ROWS, self.tree))
