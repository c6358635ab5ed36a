"""The operator in plain PyTorch, the reference of all kernels and converted graphs."""

from __future__ import annotations

import torch
from torch import Tensor


def super_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, past_lens: Tensor,
    seq_begins: Tensor, block_indices: Tensor, block_begins: Tensor, tree_mask: Tensor, tree_mask_begins: Tensor,
    sliding_window: int = 0,
) -> Tensor:  # fmt: skip
    """Compute attention in float32, and write the new rows into the caches, in place.

    The package's docstring has the shapes and types. Returns [N, Hq*D] in the query's type.
    """
    _, kv_heads, block, head_dim = key_cache.shape
    group = query.shape[1] // (kv_heads * head_dim)
    output = torch.empty_like(query)
    for i, past in enumerate(past_lens.tolist()):
        rows = slice(int(seq_begins[i]), int(seq_begins[i + 1]))
        count = rows.stop - rows.start
        blocks = block_indices[int(block_begins[i]) : int(block_begins[i + 1])].long()
        mask = _tree_mask(tree_mask, tree_mask_begins, i, count)  # [count, tree keys]
        end = past + mask.shape[1]
        new = torch.arange(end - count, end)
        for cache, packed in ((key_cache, key), (value_cache, value)):
            cache[blocks[new // block], :, new % block] = packed[rows].view(count, kv_heads, head_dim).to(cache.dtype)
        seen = torch.arange(end)
        keys = key_cache[blocks[seen // block], :, seen % block].float().repeat_interleave(group, dim=1)  # [T, Hq, D]
        values = value_cache[blocks[seen // block], :, seen % block].float().repeat_interleave(group, dim=1)
        queries = query[rows].view(count, kv_heads * group, head_dim).float()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * head_dim**-0.5
        allowed = torch.cat((torch.ones(count, past, dtype=torch.bool), mask), dim=1)
        if sliding_window:
            allowed &= allowed.flip(1).cumsum(1).flip(1) <= sliding_window
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        output[rows] = torch.einsum("hqk,khd->qhd", weights, values).flatten(1).to(output.dtype)
    return output


def _tree_mask(tree_mask: Tensor, begins: Tensor, request: int, count: int) -> Tensor:
    section = tree_mask[int(begins[request]) : int(begins[request + 1])]
    if len(section):
        return section.view(count, -1).bool()
    return torch.ones(count, count, dtype=torch.bool).tril()
