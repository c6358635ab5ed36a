"""A paged KV cache around the operator's reference, to run networks here the way an engine does."""

from __future__ import annotations

from itertools import accumulate

import torch
from super_tree_attention import super_tree_attention
from torch import Tensor

from echo_trt.models.decoder import Decoder
from echo_trt.models.layers import Attend, Config

BLOCK = 4


class PagedCache:
    """Block tables of several requests, scattered over one pool a layer.

    A row that nobody wrote is NaN: a call that reads one shows it.
    """

    def __init__(self, config: Config, layers: int, requests: int, capacity: int):
        per_request = -(-capacity // BLOCK)
        blocks = torch.randperm(requests * per_request + 3, generator=torch.Generator().manual_seed(7)).int()
        self.tables = blocks[:-3].view(requests, per_request)
        shape = (len(blocks), config.num_kv_heads, BLOCK, config.head_dim)
        self.pools = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(layers)]
        self.lengths = [0] * requests

    def attend(self, counts: list[int], masks: list[Tensor | None] | None = None) -> Attend:
        """How layers attend in a call with ``counts`` new tokens a request; a mask [n, n] or None, which is causal."""
        totals = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        used = [table[: -(-total // BLOCK)] for table, total in zip(self.tables, totals, strict=True)]
        sections = [torch.zeros(0) if mask is None else mask.flatten() for mask in masks or [None] * len(counts)]
        metadata = (
            torch.tensor(self.lengths, dtype=torch.int32),
            _begins(counts),
            torch.cat(used),
            _begins([len(blocks) for blocks in used]),
            torch.cat(sections).to(torch.uint8),
            _begins([len(section) for section in sections]),
        )
        return lambda layer, *qkv: super_tree_attention(*qkv, *self.pools[layer], *metadata)

    def commit(self, counts: list[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]


class Tree:
    """The new tokens of one request: parents[i] is an earlier node, or -1 for a root."""

    def __init__(self, parents: list[int]):
        self.parents = parents
        self.mask = torch.eye(len(parents), dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.mask[node] |= self.mask[parent]
        self.depths = self.mask.sum(dim=1) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the root down to ``node``."""
        return self.mask[node].nonzero().flatten().tolist()


def run_decoder(
    decoder: Decoder, cache: PagedCache, tokens: list[list[int]], trees: list[Tree | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """One call over the new tokens of each request: every token's logits, and its features."""
    trees = trees or [None] * len(tokens)
    counts = [len(new) for new in tokens]
    depths = [torch.arange(count) if tree is None else tree.depths for count, tree in zip(counts, trees, strict=True)]
    logits, features = decoder(
        torch.tensor(sum(tokens, [])),
        torch.cat([length + depth for length, depth in zip(cache.lengths, depths, strict=True)]),
        torch.arange(sum(counts)),
        cache.attend(counts, [None if tree is None else tree.mask for tree in trees]),
        decoder.config.feature_layers,
    )
    return list(logits.split(counts)), list(features.split(counts))


def _begins(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
