"""The running requests as arrays by slot, so that a step treats a batch of any size with the same Python."""

from __future__ import annotations

import numpy as np

from echo_trt.engine.kv_blocks import KVBlocks, blocks_for
from echo_trt.engine.params import MAX_BIASED, MAX_STOP_TOKENS, SINGLE, SamplingParams
from echo_trt.speculation.arrays import begins, compiled
from echo_trt.speculation.pack import BLOCK

_TYPES = {int: np.int64, float: np.float64, bool: np.bool_}
#: What of the parameters a draw looks at: some tokens only, what was said, anything but the target's logits.
_TRAITS = {"limited": "limits_tokens", "penalised": "penalises", "adjusted": "adjusts_logits"}
#: A slot's parameters of one number or switch, -1 for None, and these traits.
SAMPLING = np.dtype(
    [(name, _TYPES[known.kind]) for name, known in SINGLE.items()] + [(name, np.bool_) for name in _TRAITS], align=True
)
#: Of a slot: verifications; seconds saved, and their error (``Request.speculation``); whether counters have its tokens.
RECORD = np.dtype([("verifications", np.int64), ("saved", np.float64, 2), ("counted", np.bool_)], align=True)
LEAST_SHARED = 8  # tokens of a chunk that two prompts may share; less: what is left may be one token, for ever


class Known:
    """What is known beforehand of the answers in slots, tokens int64 [n] each; ``has``: whether it is any, bool [S]."""

    def __init__(self, count: int):
        self.has, self._tokens = np.zeros(count, bool), np.full(count, None, object)

    def __getitem__(self, slot: int) -> np.ndarray:
        tokens: np.ndarray = self._tokens[slot]
        return tokens

    def __setitem__(self, slot: int, tokens: np.ndarray) -> None:
        self._tokens[slot], self.has[slot] = tokens, len(tokens) > 0


class InputBatch:
    """State of up to S running requests; ``blocks``: the KV blocks that they hold.

    tokens [S, context]: prompt and generated tokens; length: how many; committed: how many are in the KV cache.
    A request decodes when length - committed == 1: the last token is the root of its tree. Until then it prefills.
    """

    def __init__(
        self, count: int, context: int, reserve: int, num_blocks: int, prefix_cache: bool = False, first_block: int = 0
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
        self.record = np.zeros(count, RECORD)
        self.sampling = np.array([_row(SamplingParams())] * count, SAMPLING)
        self.biased = ints(count)
        self.bias_tokens, self.bias = ints(count, MAX_BIASED), np.zeros((count, MAX_BIASED), np.float32)
        self.grammar = np.full(count, None, object)  # grammar.state.State of each text, None where all may follow
        #: Tokens that a slot's client expects, and the skeleton of its tool calls (``sources.calls``)
        self.known = {"prediction": Known(count), "calls": Known(count)}
        self.stop_tokens = np.full((count, MAX_STOP_TOKENS), -1, np.int64)
        self.blocks = KVBlocks(count, blocks_for(context + reserve), num_blocks, prefix_cache, first_block)

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
        if not self.blocks.open(slot, text, keys, self.reserve, finds, salt):
            return False
        self.tokens[slot, :length] = text
        self.length[slot], self.committed[slot] = length, self.blocks.found[slot]
        return True

    def skip(self, slots: np.ndarray, budget: int) -> int:
        """Skip prompt tokens whose blocks other requests have computed meanwhile; returns the number of skipped tokens.

        Prefilling ``slots`` are checked in order until their missing tokens exceed ``budget``.
        """
        skipped = 0
        for slot in slots:
            if budget <= 0:
                break
            found = self.blocks.search(slot, int(self.committed[slot]), int(self.length[slot]))
            self.committed[slot] += found
            skipped += found
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
            wanted[self.blocks.awaits(slots, self.committed[slots], budget)] = 0
            wanted[0] = min(wanted[0], max(budget - budget // 2, budget - wanted[1:].sum()))
            order[1:] = 1 + np.argsort(wanted[1:], kind="stable")
        counts: np.ndarray = np.zeros_like(wanted)
        counts[order] = np.clip(budget - begins(wanted[order])[:-1], 0, wanted[order])
        return counts

    def publish(self, slot: int) -> list[bytes]:
        """Let others find the slot's full blocks of committed text; returns their keys."""
        full = max(min(int(self.committed[slot]), int(self.length[slot]) - 1) // BLOCK, 0)
        return self.blocks.publish(slot, self.tokens[slot], full)

    def set_params(self, slot: int, params: SamplingParams) -> None:
        self.sampling[slot] = _row(params)
        self.biased[slot] = biased = len(params.logit_bias)
        self.known["prediction"][slot] = np.array(params.prediction_ids, np.int64)
        self.bias_tokens[slot, :biased], self.bias[slot, :biased] = [*params.logit_bias], [*params.logit_bias.values()]

    def release(self, slot: int) -> None:
        """Free the slot and its blocks; those of committed text stay in the cache."""
        self.blocks.release(slot, self.publish(slot))
        self.grammar[slot] = None
        self.active[slot] = False

    def append(
        self, slots: np.ndarray, counts: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Append emitted ``tokens`` int64 [sum counts] of ``slots`` [B], up to a stop token and the limit.

        Returns kept int64 [B], and whether a stop token or the limit ended the text, bool [B].
        """
        return _append(self.tokens, self.length, self.limit, self.stop_tokens, slots, counts, tokens)


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
    values = (getattr(params, name) for name in (*SINGLE, *_TRAITS.values()))
    return tuple(-1 if value is None else value for value in values)
