"""The running requests, as arrays: one slot each, so that a step treats a batch of any size with the same Python."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.pack import BLOCK
from echo_trt.decoding.ragged import begins, ragged_arange
from echo_trt.runtime.params import MAX_BIASED, MAX_STOP_TOKENS, PENALTIES, SamplingParams


class Slots:
    """State of up to S running requests, and the KV blocks they hold.

    tokens [S, context]: prompt and generated tokens; length: how many; committed: how many are in the KV cache.
    A request decodes when length - committed == 1: the last token is the root of its tree. Until then it prefills.
    """

    def __init__(self, count: int, context: int, reserve: int, num_blocks: int | None = None):
        """``reserve``: KV rows that one request's drafting and verifying can need beyond its committed tokens.

        Without ``num_blocks`` the slots are linear, as engines with a cache a slot ask for: the M blocks of slot s are
        always s * M to s * M + M - 1. Else all slots draw on one pool of so many blocks.
        """
        ints = lambda *shape: np.zeros(shape, np.int64)  # noqa: E731
        self.count, self.context, self.reserve = count, context, reserve
        self.active = np.zeros(count, bool)
        self.tokens = np.zeros((count, context), np.int32)
        self.length, self.committed, self.limit, self.prompt_length = ints(count), ints(count), ints(count), ints(count)
        self.admitted = ints(count)  # serial number of the admission: the youngest has the highest
        self.verifications, self.drafted = ints(count), ints(count)  # of tokens, those that were verified
        self.temperature, self.top_p = np.zeros(count), np.ones(count)
        self.top_k, self.seed = ints(count), ints(count)
        self.presence_penalty, self.frequency_penalty = np.zeros(count), np.zeros(count)
        self.repetition_penalty = np.ones(count)
        self.min_tokens, self.biased = ints(count), ints(count)
        self.bias_tokens, self.bias = ints(count, MAX_BIASED), np.zeros((count, MAX_BIASED), np.float32)
        self.logprobs = ints(count) - 1  # how many of the best tokens' are wanted beside the emitted one's; -1: none
        self.adjusted = np.zeros(count, bool)  # whether anything comes between the target's logits and the choice
        self.stop_tokens = np.full((count, MAX_STOP_TOKENS), -1, np.int64)
        blocks, self.linear = blocks_for(context + reserve), num_blocks is None
        self.block_table = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks) * self.linear
        self.blocks_held = ints(count)
        self._free_count = self.block_table.size if self.linear else num_blocks
        self._free = np.arange(self._free_count, dtype=np.int32)[::-1].copy()  # a stack

    @property
    def free_blocks(self) -> int:
        return self._free_count

    def decoding(self) -> np.ndarray:
        """Slots whose prompt is in the cache, oldest first."""
        return self.oldest_first(self.active & (self.length - self.committed == 1))

    def prefilling(self) -> np.ndarray:
        return self.oldest_first(self.active & (self.length - self.committed > 1))

    def oldest_first(self, chosen: np.ndarray) -> np.ndarray:
        slots = np.flatnonzero(chosen)
        return slots[np.argsort(self.admitted[slots], kind="stable")]

    def hold(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Give each slot the blocks for ``lengths`` tokens, all of them or none. False: the pool is too empty."""
        wanted = np.maximum(blocks_for(lengths) - self.blocks_held[slots], 0)
        total = int(wanted.sum())
        if total > self._free_count:
            return False
        self._free_count -= total
        if not self.linear:
            places = np.repeat(self.blocks_held[slots], wanted) + ragged_arange(wanted)
            self.block_table[np.repeat(slots, wanted), places] = self._free[self._free_count : self._free_count + total]
        self.blocks_held[slots] += wanted
        return True

    def ask(self, slot: int, params: SamplingParams) -> None:
        """Note how a slot's tokens are to be chosen."""
        for name in ("temperature", "top_k", "top_p", "seed", "min_tokens", *PENALTIES):
            getattr(self, name)[slot] = getattr(params, name)
        self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self.biased[slot] = biased = len(params.logit_bias)
        self.bias_tokens[slot, :biased], self.bias[slot, :biased] = [*params.logit_bias], [*params.logit_bias.values()]
        self.adjusted[slot] = params.adjusts_logits

    def release(self, slot: int) -> None:
        """Free the slot and its blocks."""
        held = int(self.blocks_held[slot])
        if not self.linear:
            self._free[self._free_count : self._free_count + held] = self.block_table[slot, :held]
        self._free_count += held
        self.blocks_held[slot] = 0
        self.active[slot] = False

    def rows(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pool rows of token ``positions`` [m] of ``slots`` [m]; row r is block r // BLOCK, r % BLOCK."""
        return self.block_table[slots, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK

    def append(
        self, slots: np.ndarray, counts: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Append each slot's emitted tokens (ragged, ``counts`` each), up to its first stop token and its limit.

        Returns, per slot: how many were kept, whether a stop token ended it, whether its limit did.
        """
        begin = begins(counts)
        place = ragged_arange(counts)
        owner = np.repeat(slots, counts)
        stops = (tokens[:, None] == self.stop_tokens[owner]).any(axis=1)
        first_stop = np.minimum.reduceat(np.where(stops, place, len(tokens)), begin[:-1]) + 1
        kept = np.minimum(np.minimum(counts, first_stop), self.limit[slots] - self.length[slots])
        keep = place < np.repeat(kept, counts)
        self.tokens[owner[keep], self.length[owner[keep]] + place[keep]] = tokens[keep]
        self.length[slots] += kept
        return kept, first_stop <= kept, self.length[slots] >= self.limit[slots]


def blocks_for(tokens):
    """Blocks that hold this many tokens; an int or an array of them."""
    return -(-tokens // BLOCK)
