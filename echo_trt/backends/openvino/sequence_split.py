"""Calls as OpenVINO computes them best: chains as lanes, and padding to few sizes.

A lane is a token of a chain as a sequence of its own, over the same KV blocks.

OpenVINO's attention has one kernel for a single token of a request and another for several tokens. Their low-precision
results differ, so a verified chain would not have plain decoding's logits bit by bit, and a call that needs both
kernels pays for both. All new rows are written before any is attended. Token j of a chain can therefore be a sequence
with a past that is j longer: the same attention, by the kernel of plain decoding.

A graph is compiled for any size, and a pass of another size than the last one pays for it: shapes are inferred and
kernels prepared again, for the time of five to ten tokens. Trees change size from pass to pass, so their passes are
padded to the next size, and the planner counts the padding as free. A planner that pins a size for a while says so, and
smaller passes are padded to the pinned size. Plain decoding repeats its size and is not padded. A draft that catches up
with a prompt is padded too, since new kernels would take as long as its pass.
"""

from __future__ import annotations

import numpy as np

from echo_trt.backends.base import METADATA
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.pack import BLOCK, ForwardBatch

LONGEST = 32  # tokens of a chain without a mask; larger: long chains miss the kernel for many tokens, which is faster
_TYPES = ("i4[::1]", "i4[::1]", "i4[::1]", "i4[::1]", "u1[::1]", "i4[::1]")


def as_sequences(call: ForwardBatch, unmasked: bool) -> ForwardBatch:
    """Turn chains of two or more tokens with a mask into one request per token; trees stay as they are.

    ``unmasked`` adds chains of 2 to LONGEST tokens without a mask. A target must not have it: its unmasked chains are
    parts of prompts, and only the kernel for many tokens makes rows independent of how a prompt was divided.
    """
    if call.seq_begins[-1] == len(call.past_lens):  # single tokens alone
        return call
    masks = call.tree_mask, call.tree_mask_begins
    chain = _chains(call.seq_begins, *masks, LONGEST if unmasked else 0)
    if not chain.any():
        return call
    blocks = call.block_indices, call.block_begins
    sequences = _as_sequences(chain, call.past_lens, call.seq_begins, *blocks, *masks)
    return call._replace(**dict(zip(METADATA, sequences, strict=True)))


@compiled("b1[::1](i4[::1], u1[::1], i4[::1], i8)")
def _chains(seq_begins: np.ndarray, tree_mask: np.ndarray, mask_begins: np.ndarray, longest: int) -> np.ndarray:
    """Find chains, bool [B]: requests of two or more tokens with a causal mask, or none up to ``longest`` tokens."""
    chain = np.zeros(len(seq_begins) - 1, np.bool_)
    for request in range(len(chain)):
        count = seq_begins[request + 1] - seq_begins[request]
        seen = tree_mask[mask_begins[request] : mask_begins[request + 1]]
        causal = seen.sum() == count * (count + 1) // 2 if len(seen) else count <= longest
        chain[request] = count >= 2 and causal
    return chain


@compiled(f"Tuple(({', '.join(_TYPES)}))(b1[::1], {', '.join(_TYPES)})")
def _as_sequences(
    chain: np.ndarray,
    past_lens: np.ndarray,
    seq_begins: np.ndarray,
    block_indices: np.ndarray,
    block_begins: np.ndarray,
    tree_mask: np.ndarray,
    mask_begins: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    counts, blocks = np.diff(seq_begins), np.diff(block_begins)
    sequences = np.where(chain, counts, 1)
    size = sequences.sum()
    past = np.empty(size, np.int32)
    seq, block, area = np.zeros(size + 1, np.int32), np.zeros(size + 1, np.int32), np.zeros(size + 1, np.int32)
    indices = np.empty((sequences * blocks).sum(), np.int32)
    mask = np.empty(len(tree_mask), np.uint8)
    sequence = 0
    for request in range(len(chain)):
        tokens = 1 if chain[request] else counts[request]
        seen = tree_mask[mask_begins[request] : mask_begins[request + 1]][: 0 if chain[request] else len(tree_mask)]
        for before in range(sequences[request]):
            past[sequence] = past_lens[request] + before
            used = (past[sequence] + tokens + BLOCK - 1) // BLOCK
            seq[sequence + 1] = seq[sequence] + tokens
            block[sequence + 1] = block[sequence] + used
            area[sequence + 1] = area[sequence] + len(seen)
            first = block_begins[request]
            indices[block[sequence] : block[sequence + 1]] = block_indices[first : first + used]
            mask[area[sequence] : area[sequence + 1]] = seen
            sequence += 1
    return past, seq, indices[: block[size]], block, mask[: area[size]], area


def pad_requests(call: ForwardBatch, size: int, block: int, pad_rows: bool = True) -> ForwardBatch:
    """Pad ``call`` to ``size`` tokens with requests of one token, and rows of logits likewise with ``pad_rows``.

    Keys and values of padding go to ``block``, which no other request holds.
    """
    count = len(call.token_ids)
    more = size - count
    if more <= 0:
        return call
    zeros = np.zeros(more, np.int32)
    follow = np.arange(1, more + 1, dtype=np.int32)
    return call._replace(
        token_ids=np.concatenate((call.token_ids, zeros)),
        positions=np.concatenate((call.positions, zeros)),
        past_lens=np.concatenate((call.past_lens, zeros)),
        seq_begins=np.concatenate((call.seq_begins, count + follow)),
        block_indices=np.concatenate((call.block_indices, zeros + np.int32(block))),
        block_begins=np.concatenate((call.block_begins, call.block_begins[-1] + follow)),
        tree_mask_begins=np.concatenate((call.tree_mask_begins, zeros + call.tree_mask_begins[-1])),
        logit_rows=np.concatenate((call.logit_rows, np.full(more if pad_rows else 0, size - 1))),
    )
