"""Random calls of the attention operator, and the kernel's answers beside the reference's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from super_tree_attention import super_tree_attention

BLOCK = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of outputs of size 1, which both sides compute in float32 and round once; the kernel rounds its weights too.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Batch:
    """Random arguments of a call: requests of (past, new tokens, whether they come with a mask, earlier tree keys).

    Without a fourth number a request has no earlier tree keys. Blocks are scattered over the pool, and every row that
    the call may not read is NaN.
    """

    def __init__(self, requests, kv_heads=1, group=1, head_dim=64, dtype=torch.float32, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        pasts, counts, masked, *more = zip(*requests, strict=True)
        earlier = more[0] if more else [0] * len(pasts)
        earlier = [n if tree and count else 0 for n, tree, count in zip(earlier, masked, counts, strict=True)]
        cached = [past + n for past, n in zip(pasts, earlier, strict=True)]
        used = [-(-(past + count) // BLOCK) for past, count in zip(cached, counts, strict=True)]
        tables = 1 + torch.randperm(sum(used) + 3, generator=self.generator)[: sum(used)].int()  # block 0: all NaN
        masks = [
            self._mask(count, n) if tree else torch.zeros(0)
            for count, n, tree in zip(counts, earlier, masked, strict=True)
        ]
        self.metadata = (
            torch.tensor(pasts, dtype=torch.int32),
            _begins(counts),
            tables,
            _begins(used),
            torch.cat(masks).to(torch.uint8),
            _begins([len(mask) for mask in masks]),
        )
        self.caches = [self._cache(cached, tables.split(used), kv_heads, head_dim, dtype) for _ in range(2)]
        widths = kv_heads * group * head_dim, kv_heads * head_dim, kv_heads * head_dim
        self.packed = [self._random(sum(counts), width).to(dtype) for width in widths]

    def check(self, **options) -> None:
        """Check that the kernel's output and caches are the reference's: the new rows are there and nothing else has
        changed.
        """
        from super_tree_attention.triton_attention import super_tree_attention_triton

        dtype = self.packed[0].dtype
        expected_caches = [cache.clone() for cache in self.caches]
        window = options.get("sliding_window", 0)
        expected = super_tree_attention(*self.packed, *expected_caches, *self.metadata, window)
        caches = [cache.to(DEVICE, copy=True) for cache in self.caches]
        others = [tensor.to(DEVICE) for tensor in (*self.packed, *self.metadata)]
        with poisoned_memory():
            output = super_tree_attention_triton(*others[:3], *caches, *others[3:], **options).cpu()
        assert not expected.isnan().any()
        torch.testing.assert_close(output.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        for cache, expected_cache in zip(caches, expected_caches, strict=True):
            torch.testing.assert_close(cache.cpu(), expected_cache, atol=0, rtol=0, equal_nan=True)

    def _cache(self, pasts, tables, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        blocks = sum(map(len, tables)) + 4
        cache = torch.full((blocks, kv_heads, BLOCK, head_dim), torch.nan, dtype=dtype)
        for past, table in zip(pasts, tables, strict=True):
            position = torch.arange(past)
            rows = self._random(past, kv_heads, head_dim).to(dtype)
            cache[table[position // BLOCK].long(), :, position % BLOCK] = rows
        return cache

    def _mask(self, count: int, earlier: int) -> Tensor:
        """Any matrix in which a token sees itself: the operator does not ask that it be a tree's."""
        seen = torch.rand(count, earlier + count, generator=self.generator) < 0.4
        seen[:, earlier:] |= torch.eye(count, dtype=torch.bool)
        return seen.flatten()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _begins(lengths) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that a row which nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
