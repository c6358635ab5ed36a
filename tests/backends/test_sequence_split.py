"""Lanes are another way to pass the same tokens: the operator's results and cache rows stay the same."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_openvino import BLOCKS, Calls

from echo_trt.backends.openvino.sequence_split import LONGEST, as_sequences
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask
from super_tree_attention import super_tree_attention

HEADS, KV_HEADS, DIM = 4, 2, 8


def attend(call: ForwardBatch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference operator on random rows and a random pool: its output, and the pool afterwards."""
    generator = torch.Generator().manual_seed(seed)
    count = len(call.token_ids)
    query = torch.randn(count, HEADS * DIM, generator=generator)
    key, value = torch.randn(2, count, KV_HEADS * DIM, generator=generator)
    pool = torch.randn(2, BLOCKS, KV_HEADS, BLOCK, DIM, generator=generator)
    names = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins")
    metadata = [torch.from_numpy(getattr(call, name)) for name in names]
    _write_all(pool, key, value, call)
    return super_tree_attention(query, key, value, *pool, *metadata), pool


def _write_all(pool, key, value, call: ForwardBatch) -> None:
    """As OpenVINO does: every request's rows before any is attended."""
    for i, past in enumerate(call.past_lens):
        rows = np.arange(call.seq_begins[i], call.seq_begins[i + 1])
        index = past + np.arange(len(rows))
        blocks = call.block_indices[call.block_begins[i] + index // BLOCK]
        for part, new in zip(pool, (key, value), strict=True):
            part[blocks, :, index % BLOCK] = new[rows].view(-1, KV_HEADS, DIM)


@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_the_operator_gives_the_same(seed, requests, unmasked):
    calls = Calls(seed, requests)
    for call in (calls.prompts(), calls.trees_and_chunks()):
        (want, pool), (got, same_pool) = attend(call, seed), attend(as_sequences(call, unmasked), seed)
        torch.testing.assert_close(got, want)
        assert torch.equal(pool, same_pool)


def test_chains_become_single_tokens_and_trees_stay():
    tree = SuperTree.from_roots(np.arange(3))
    chain = tree.add(np.array([0]), np.array([7]), np.zeros(1))
    tree.add(chain, np.array([8]), np.zeros(1))
    tree.add(np.array([1, 1]), np.array([7, 8]), np.zeros(2))
    tree, _ = tree.sorted_by_request(np.arange(len(tree)))
    counts = np.array([3, 3, 1, LONGEST + 1])
    total = int(counts.sum())
    call = pack(
        np.arange(total),
        np.arange(total),
        np.array([BLOCK - 1, 4, 9, 0]),
        counts,
        np.arange(8).reshape(4, 2),
        np.arange(total),
        ancestor_mask(tree),
    )
    sequences = as_sequences(call, unmasked=True)
    assert np.diff(sequences.seq_begins).tolist() == [1, 1, 1, 3, 1, LONGEST + 1]
    assert sequences.past_lens.tolist() == [BLOCK - 1, BLOCK, BLOCK + 1, 4, 9, 0]
    assert np.diff(sequences.block_begins).tolist() == [1, 2, 2, 1, 1, 2]
    assert sequences.block_indices.tolist() == [0, 0, 1, 0, 1, 2, 4, 6, 7]
    assert np.diff(sequences.tree_mask_begins).tolist() == [0, 0, 0, 9, 1, 0]


def test_parts_of_prompts_stay_together_unless_asked():
    counts = np.array([2, LONGEST, LONGEST + 1])
    total = int(counts.sum())
    table = np.arange(6).reshape(3, 2)
    call = pack(np.arange(total), np.arange(total), np.zeros(3, np.int64), counts, table, np.arange(total))
    assert np.diff(as_sequences(call, unmasked=False).seq_begins).tolist() == counts.tolist()
    assert np.diff(as_sequences(call, unmasked=True).seq_begins).tolist() == [1] * (2 + LONGEST) + [LONGEST + 1]
