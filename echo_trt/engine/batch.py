"""The running requests as arrays by slot, so that a step treats a batch of any size with the same Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from echo_trt.engine.params import MAX_BIASED, MAX_STOP_TOKENS, SINGLE, SamplingParams
from echo_trt.engine.prefix_cache import PrefixCache
from echo_trt.speculation.arrays import begins, compiled, ragged_arange
from echo_trt.speculation.pack import BLOCK

#: A slot's parameters of one number or switch; -1 stands for None.
_TYPES = {int: np.int64, float: np.float64, bool: np.bool_}
SAMPLING = np.dtype([(name, _TYPES[known.kind]) for name, known in SINGLE.items()], align=True)
LEAST_SHARED = 8  # tokens of a chunk that two prompts may share; less: what is left may be one token, for ever
NEVER = 2**62  # larger than ``added`` of any cache: the slot never searches the cache again

Amount = TypeVar("Amount", int, np.ndarray)


class InputBatch:
    """State of up to S running requests, and the KV blocks they hold.

    tokens [S, context]: prompt and generated tokens; length: how many; committed: how many are in the KV cache.
    A request decodes when length - committed == 1: the last token is the root of its tree. Until then it prefills.
    A block is free, or held by slots (by several only where it is full of committed text that they share), or cached:
    full of text that a slot may find there again. The target never writes to shared or cached blocks, because it writes
    after the committed text. A draft's prefill may write to them: it writes the values that they hold, since the text
    is the same.
    """

    def __init__(
        self,
        count: int,
        context: int,
        reserve: int,
        num_blocks: int,
        prefix_cache: bool = False,
        first_block: int = 0,
    ):
        """``reserve``: KV rows that one request's drafting and verifying can need beyond its committed tokens.

        All slots share a pool of ``num_blocks`` blocks, beginning at the engine's block ``first_block``.
        """

        def ints(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int64)

        self.count, self.context, self.reserve = count, context, reserve
        self.active = np.zeros(count, bool)
        self.tokens = np.zeros((count, context), np.int32)
        self.length, self.committed, self.limit, self.prompt_length = ints(count), ints(count), ints(count), ints(count)
        self.admitted = ints(count)  # serial number of the admission: the youngest has the highest
        self.verifications = ints(count)
        self.counted = np.ones(count, bool)  # whether counters have a slot's tokens
        self.sampling = np.array([_row(SamplingParams())] * count, SAMPLING)
        self.biased = ints(count)
        self.bias_tokens, self.bias = ints(count, MAX_BIASED), np.zeros((count, MAX_BIASED), np.float32)
        self.grammar = np.full(count, None, object)  # grammar.state.State of each text, None where all may follow
        self.limited = np.zeros(count, bool)  # whether a draw is among some tokens only
        self.penalised = np.zeros(count, bool)  # whether a penalty looks at what was said
        self.adjusted = np.zeros(count, bool)  # whether anything comes between the target's logits and the choice
        self.stop_tokens = np.full((count, MAX_STOP_TOKENS), -1, np.int64)
        self.block_table = np.zeros((count, blocks_for(context + reserve)), np.int32)
        self.blocks_held, self.num_blocks = ints(count), num_blocks
        self._free_count = self.num_blocks
        self._free = (first_block + np.arange(self.num_blocks, dtype=np.int32))[::-1].copy()  # a stack
        self.cache = PrefixCache(prefix_cache)
        # Whether the draft's KV of a block's text is in it, too.
        self.block_drafted = np.zeros(first_block + self.num_blocks, bool)
        self.keys: list[list[bytes]] = [[] for _ in range(count)]  # of each text's blocks, as far as they are known
        self.salts = [b""] * count  # of these keys
        self.found = ints(count)  # tokens of a slot's text that were in the cache
        self.looked = ints(count)  # ``added`` of the cache when a slot last searched it

    @property
    def free_blocks(self) -> int:
        return self._free_count

    @property
    def cached_blocks(self) -> int:
        return self.cache.idle

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - self.free_blocks - self.cached_blocks

    def decoding(self) -> np.ndarray:
        """Return slots whose prompt is in the cache, oldest first."""
        return _phase(self.active, self.length, self.committed, self.admitted, False)

    def prefilling(self) -> np.ndarray:
        return _phase(self.active, self.length, self.committed, self.admitted, True)

    def recent(self, slots: np.ndarray, count: int) -> np.ndarray:
        """Return the last ``count`` tokens before a slot's last token, -1 where there are fewer: int64 [B, count]."""
        return _recent(self.tokens, slots, self.length, count)

    def oldest_first(self, chosen: np.ndarray) -> np.ndarray:
        slots = chosen.nonzero()[0]
        return slots[np.argsort(self.admitted[slots], kind="stable")]

    def open(self, slot: int, text: np.ndarray, keys: list[bytes], finds: bool = True, salt: bytes = b"") -> bool:
        """Put a text [n] into a free slot: the cached blocks of its beginning are committed, the rest is given blocks.

        ``keys`` are those of the text's blocks, as far as they are known; more are added. False: the pool is too empty
        for the text and for drafting behind it. ``finds``: cached blocks are used; else all of it is computed.
        ``salt``: of the keys.
        """
        text, length = text.astype(np.int32), len(text)
        self.cache.extend(keys, text, _shareable(length), salt)
        found = self.cache.find(keys[: _shareable(length)]) if finds else []
        available = self.free_blocks + self.cached_blocks - self.cache.idle_of(found)
        if blocks_for(length + self.reserve) - len(found) > available:
            return False
        self.cache.hold(found)
        self.keys[slot], self.looked[slot] = keys, self.cache.added if finds else NEVER
        self.salts[slot] = salt
        self.tokens[slot, :length] = text
        self.length[slot] = length
        self.committed[slot] = self.found[slot] = len(found) * BLOCK
        if found:
            self.block_table[slot, : len(found)] = found
        self.blocks_held[slot] = len(found)
        return self.hold(np.array([slot]), np.array([length]))

    def skip(self, slots: np.ndarray, budget: int) -> int:
        """Skip prompt tokens whose blocks other requests have computed meanwhile; returns the number of skipped tokens.

        Prefilling ``slots`` are checked in order until their missing tokens exceed ``budget``.
        """
        skipped = 0
        for slot in slots:
            if budget <= 0:
                break
            if self.looked[slot] < self.cache.added:
                skipped += self._skip(slot)
            budget -= int(self.length[slot] - self.committed[slot])
        return skipped

    def divide(self, slots: np.ndarray, budget: int, shares: bool) -> np.ndarray:
        """Return how many tokens of a budget each prompt of prefilling ``slots`` gets, in order: int64 [n].

        ``shares``: the first leaves half to the shortest of the others, so that a short prompt does not wait for a
        long one. A prompt that will find as much, once one before it is computed, waits for that.
        """
        wanted: np.ndarray = self.length[slots] - self.committed[slots]
        order = np.arange(len(slots))
        if shares and budget >= LEAST_SHARED and wanted.sum() > budget and len(slots) > 1:
            wanted[self._await_blocks(slots, budget)] = 0
            wanted[0] = min(wanted[0], max(budget - budget // 2, budget - wanted[1:].sum()))
            order[1:] = 1 + np.argsort(wanted[1:], kind="stable")
        counts: np.ndarray = np.zeros_like(wanted)
        counts[order] = np.clip(budget - begins(wanted[order])[:-1], 0, wanted[order])
        return counts

    def _await_blocks(self, slots: np.ndarray, worth: int) -> list[int]:
        """Return which of ``slots`` will find ``worth`` tokens or more in blocks that one before them computes."""
        needed, before, found = -(-worth // BLOCK), list[list[bytes]](), list[int]()
        for i, slot in enumerate(slots.tolist()):  # a prompt's blocks are found once all of it is computed
            keys, last = self.keys[slot], int(self.committed[slot]) // BLOCK + needed - 1
            # A key is of all the text up to its block, so one says that all before it are alike.
            searches = self.looked[slot] != NEVER and last < len(keys)
            if searches and any(last < len(others) and others[last] == keys[last] for others in before):
                found.append(i)
            before.append(keys)
        return found

    def _skip(self, slot: int) -> int:
        begin, first = int(self.committed[slot]), int(self.committed[slot]) // BLOCK
        found = self.cache.find(self.keys[slot][first : _shareable(int(self.length[slot]))])
        self.looked[slot] = self.cache.added
        if not found:
            return 0
        span = slice(first, first + len(found))
        self.cache.hold(found)
        self._give(self.block_table[slot, span])
        self.block_table[slot, span] = found
        self.committed[slot] = span.stop * BLOCK
        self.found[slot] += span.stop * BLOCK - begin
        return span.stop * BLOCK - begin

    def publish(self, slot: int) -> list[bytes]:
        """Let others find the slot's full blocks of committed text; returns their keys."""
        full = max(min(int(self.committed[slot]), int(self.length[slot]) - 1) // BLOCK, 0)
        self.cache.extend(self.keys[slot], self.tokens[slot], full, self.salts[slot])
        keys = self.keys[slot][:full]
        self.cache.add(keys, self.block_table[slot, : len(keys)].tolist(), self.tokens[slot])
        return keys

    def hold(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Give slots the blocks for ``lengths`` tokens, all or none. False: the pool is too empty."""
        wanted = np.maximum(blocks_for(lengths) - self.blocks_held[slots], 0)
        total = int(wanted.sum())
        if total == 0:  # most iterations
            return True
        if total > self.free_blocks + self.cached_blocks:
            return False
        if total > self.free_blocks:
            self._give(self.cache.evict(total - self.free_blocks))
        self._free_count -= total
        owners, columns = np.repeat(slots, wanted), np.repeat(self.blocks_held[slots], wanted) + ragged_arange(wanted)
        self.block_table[owners, columns] = self._free[self._free_count : self._free_count + total]
        self.block_drafted[self.block_table[owners, columns]] = False
        self.blocks_held[slots] += wanted
        return True

    def set_params(self, slot: int, params: SamplingParams) -> None:
        self.sampling[slot] = _row(params)
        self.biased[slot] = biased = len(params.logit_bias)
        self.bias_tokens[slot, :biased], self.bias[slot, :biased] = [*params.logit_bias], [*params.logit_bias.values()]
        self.penalised[slot] = params.penalises
        self.adjusted[slot] = params.adjusts_logits
        self.limited[slot] = params.limits_tokens

    def release(self, slot: int) -> None:
        """Free the slot and its blocks; those of committed text stay in the cache."""
        held = int(self.blocks_held[slot])
        self._give(self.cache.leave(self.publish(slot), self.block_table[slot, :held].tolist()))
        self.blocks_held[slot] = 0
        self.grammar[slot] = None
        self.active[slot] = False

    def forget_cached(self) -> None:
        """Empty the cache, before something writes over the pool."""
        self._give(self.cache.forget(self.cache.idle))

    def _give(self, blocks: Sequence[int] | np.ndarray) -> None:
        self._free[self._free_count : self._free_count + len(blocks)] = blocks
        self._free_count += len(blocks)

    def rows(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pool rows of token ``positions`` [m] of ``slots`` [m]; row r is block r // BLOCK, r % BLOCK."""
        return _rows(self.block_table, slots, positions)

    def append(
        self, slots: np.ndarray, counts: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Append emitted ``tokens`` int64 [sum counts] of ``slots`` [B], up to a stop token and the limit.

        Returns kept int64 [B], and whether a stop token or the limit ended the text, bool [B].
        """
        return _append(self.tokens, self.length, self.limit, self.stop_tokens, slots, counts, tokens)


def blocks_for(tokens: Amount) -> Amount:
    """Return the blocks that hold ``tokens``; an int or an array."""
    blocks: Amount = -(-tokens // BLOCK)
    return blocks


def _shareable(length: int) -> int:
    """Return how many blocks of a text of ``length`` tokens may come from the cache: the last two tokens are always
    computed.
    """
    return max(length - 2, 0) // BLOCK


@compiled("i8[::1](b1[::1], i8[::1], i8[::1], i8[::1], b1)")
def _phase(
    active: np.ndarray, length: np.ndarray, committed: np.ndarray, admitted: np.ndarray, prefills: bool
) -> np.ndarray:
    """Return active slots that prefill, or that decode, oldest first."""
    slots, number = np.empty(len(active), np.int64), 0
    for slot in range(len(active)):
        missing = length[slot] - committed[slot]
        if active[slot] and (missing > 1 if prefills else missing == 1):
            slots[number] = slot
            number += 1
    slots = slots[:number]
    return slots[np.argsort(admitted[slots], kind="mergesort")]


@compiled("i8[::1](i4[:, ::1], i8[::1], i8[::1])")
def _rows(block_table: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
    rows = np.empty(len(slots), np.int64)
    for i in range(len(slots)):
        rows[i] = np.int64(block_table[slots[i], positions[i] // BLOCK]) * BLOCK + positions[i] % BLOCK
    return rows


@compiled("i8[:, ::1](i4[:, ::1], i8[::1], i8[::1], i8)")
def _recent(tokens: np.ndarray, slots: np.ndarray, length: np.ndarray, count: int) -> np.ndarray:
    recent = np.full((len(slots), count), -1)
    for row in range(len(slots)):
        last = length[slots[row]] - 1
        for back in range(1, min(count, last) + 1):
            recent[row, count - back] = tokens[slots[row], last - back]
    return recent


@compiled("Tuple((i8[::1], b1[::1], b1[::1]))(i4[:, ::1], i8[::1], i8[::1], i8[:, ::1], i8[::1], i8[::1], i8[::1])")
def _append(
    text: np.ndarray,
    length: np.ndarray,
    limit: np.ndarray,
    stop_tokens: np.ndarray,
    slots: np.ndarray,
    counts: np.ndarray,
    tokens: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kept, begin = np.zeros(len(slots), np.int64), 0
    stopped, full = np.zeros(len(slots), np.bool_), np.zeros(len(slots), np.bool_)
    for row in range(len(slots)):
        slot = slots[row]
        for token in tokens[begin : begin + counts[row]]:
            if stopped[row] or length[slot] >= limit[slot]:
                break
            text[slot, length[slot]] = token
            length[slot] += 1
            kept[row] += 1
            stopped[row] = (stop_tokens[slot] == token).any()
        full[row] = length[slot] >= limit[slot]
        begin += counts[row]
    return kept, stopped, full


def _row(params: SamplingParams) -> tuple[float, ...]:
    return tuple(-1 if (value := getattr(params, name)) is None else value for name in SINGLE)
