"""Lanes are another way to pass the same tokens: the operator's results and cache rows stay the same."""

import numpy as np

from echo_trt.backends.openvino.sequence_split import LONGEST, as_sequences
from echo_trt.speculation.pack import BLOCK, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask


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
