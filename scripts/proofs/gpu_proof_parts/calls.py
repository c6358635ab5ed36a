"""Random calls of the operator: ragged requests with trees, chunks and single tokens, over scattered KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echo_trt.decoding.pack import BLOCK, pack
from echo_trt.decoding.super_tree import SuperTree, ancestor_mask

METADATA = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins")


@dataclass(frozen=True)
class Shape:
    """past [B] and counts [B] tokens of each request; the first ``trees`` of them bring trees, others are causal."""

    past: np.ndarray
    counts: np.ndarray
    trees: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of the past's keys and values: read once, they are what any kernel must move."""
        return int(self.past.sum()) * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize


def random_call(shape: Shape, rng: np.random.Generator, device: torch.device, spare: int = 3) -> dict[str, Tensor]:
    """The operator's arguments by name. Rows of the pools that no request has committed are NaN."""
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
    tokens, table = int(shape.counts.sum()), scattered(shape.past + shape.counts, rng, spare)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

    kv = shape.kv_heads * shape.head_dim
    call = {"query": noise(tokens, shape.heads * shape.head_dim), "key": noise(tokens, kv), "value": noise(tokens, kv)}
    pool = int(table.max()) + 1 + spare, shape.kv_heads, BLOCK, shape.head_dim
    blocks, rows = (torch.from_numpy(a).to(device) for a in places(table, np.zeros_like(shape.past), shape.past))
    for name in ("key_cache", "value_cache"):
        call[name] = torch.full(pool, float("nan"), dtype=shape.dtype, device=device)
        call[name][blocks, :, rows] = noise(len(rows), shape.kv_heads, shape.head_dim)
    return call | metadata(shape, table, rng, device)


def metadata(shape: Shape, table: np.ndarray, rng: np.random.Generator, device: torch.device) -> dict[str, Tensor]:
    tree, mask = random_trees(shape.counts[: shape.trees], rng), None
    if shape.trees:
        mask = ancestor_mask(tree)
    zeros = np.zeros(int(shape.counts.sum()), np.int64)
    packed = pack(zeros, zeros, shape.past, shape.counts, table, zeros[:1], mask)
    return {name: torch.from_numpy(getattr(packed, name)).to(device) for name in METADATA}


def random_trees(sizes: np.ndarray, rng: np.random.Generator) -> SuperTree:
    """A tree of ``sizes[i]`` nodes for each request, every node under a random earlier one."""
    tree = SuperTree.from_roots(np.zeros(len(sizes), np.int64))
    newest = np.arange(len(sizes))
    for step in range(1, int(sizes.max()) if len(sizes) else 0):
        growing = np.flatnonzero(sizes > step)
        parents = np.where(rng.random(len(growing)) < 0.5, newest[growing], growing)  # the newest node, or the root
        first = len(tree)
        tree.add(parents, np.zeros(len(growing), np.int64), np.zeros(len(growing)))
        newest[growing] = first + np.arange(len(growing))
    return tree.sorted_by_request(np.arange(len(tree)))[0]


def scattered(lengths: np.ndarray, rng: np.random.Generator, spare: int) -> np.ndarray:
    """A block table [B, most] whose blocks lie in random order in a pool with ``spare`` unused ones."""
    used = -(-lengths // BLOCK)
    most = int(used.max())
    return rng.permutation(len(lengths) * most + spare)[: len(lengths) * most].reshape(len(lengths), most)


def places(table: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block and row in it of the positions from begin[i] to end[i] of every request, end to end."""
    owner = np.repeat(np.arange(len(begin)), end - begin)
    position = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
    return table[owner, position // BLOCK], position % BLOCK
