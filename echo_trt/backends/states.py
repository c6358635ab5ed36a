"""States of recurrent layers beside the KV pool, in the host's memory: a slot for each running request, and copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.errors import UserError
from echo_trt.speculation.arrays import begins, compiled
from echo_trt.speculation.pack import BLOCK, ForwardBatch

#: Tokens of one request in a call. Larger: prompts in fewer passes, which keep more beside their states.
MAX_ROWS = 128
#: Copies of states that a prefix cache keeps for each slot. Larger: more conversations are found, in more memory.
KEPT = 4


class KeepsStates(Engine):
    """The trait of an engine whose network may have states beside KV rows.

    A run reads the states of its ``ForwardBatch.slots``, and starts from zero where a request has no past.
    """

    states: RequestStates | None = None

    def _open_states(self, shapes: Mapping[str, tuple[int, ...]], slots: int, applied: int = 0) -> None:
        """Make states of ``slots`` requests; ``shapes``: of a request's by input name, kind.layer, none without any."""
        if shapes:
            self.states, self.paged, self.longest = RequestStates(shapes, slots, applied), False, MAX_ROWS

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        if self.states:
            self.states.commit(rows, counts)


#: A request's states of convolutions [L, 1, 3, C] and delta-nets [L, 1, H, dk, dv], float32.
StateCopy = tuple[np.ndarray, np.ndarray]


class RequestStates:
    """Convolution and delta-net states of ``slots`` requests, float32, whose memory is taken as they are written.

    conv     [L, S + 1, 3, C], of which the last slot is for what is tried
    delta    [L, S + 1, Hv, dk, dv], empty where there are short convolutions
    applied  first tokens of a request in a pass, 0 or 1, whose writing is in ``delta`` already behind the pass
    follow   advances a slot in place along a path of the last pass's packed rows; an engine may have a faster one
    """

    #: The head of keys of each head of values, among those that ``keep`` is given.
    key_head: Sequence[int] | slice = slice(None)

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], slots: int, applied: int = 0):
        self.slots, self.applied = slots, applied
        self.conv, self.delta = (self._zeros(shapes, kind) for kind in ("conv_state", "delta_state"))
        self.of_requests = np.zeros(0, np.int64)  # slots of the last pass's requests
        self._outputs: tuple[np.ndarray, ...] = ()
        self.follow: Callable[[int, np.ndarray], None] = self._follow

    def _zeros(self, shapes: Mapping[str, tuple[int, ...]], kind: str) -> np.ndarray:
        found = [shape for name, shape in shapes.items() if name.startswith(f"{kind}.")]
        return np.zeros((len(found), self.slots + 1, *found[0]), np.float32)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The states of the last pass's requests by input name."""
        kinds = (("conv_state", self.conv), ("delta_state", self.delta))
        return {f"{kind}.{i}": part[self.of_requests] for kind, parts in kinds for i, part in enumerate(parts)}

    def begin(self, call: ForwardBatch) -> np.ndarray:
        """Begin a pass; returns its tokens' ``parents``. A request without past begins with states of zero."""
        slots = call.slots
        if len(slots) == 0:  # a call without requests of its own, such as a measurement's
            slots = np.arange(len(call.past_lens))
        new = slots[call.past_lens == 0]
        self.conv[:, new] = 0
        self.delta[:, new] = 0
        self.of_requests = slots
        return parents(call)

    def keep(self, *outputs: np.ndarray) -> None:
        """Keep the pass's ``delta_net.COMMIT_OUTPUTS`` for ``commit``."""
        self._outputs = outputs

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Advance the last pass's requests over the packed ``rows``, ``counts`` int64 [B] of them, in path order."""
        ends = begins(counts)
        for request in np.flatnonzero(counts):
            self.follow(int(self.of_requests[request]), rows[ends[request] : ends[request + 1]])

    def ahead(self, request: int, path: np.ndarray) -> StateCopy:
        """Return the states that a request of the last pass, not yet committed, has behind packed rows ``path``."""
        slot, tried = int(self.of_requests[request]), self.slots
        for part in (self.conv, self.delta):
            part[:, tried] = part[:, slot]
        self.follow(tried, path)
        return self.conv[:, tried:].copy(), self.delta[:, tried:].copy()

    def put(self, slot: int, state: StateCopy) -> None:
        """Let a slot go on from a ``state`` that ``ahead`` has returned."""
        self.conv[:, slot : slot + 1], self.delta[:, slot : slot + 1] = state

    def _follow(self, slot: int, path: np.ndarray) -> None:
        (keys, updates, fades, mixed), conv, delta = self._outputs, self.conv[:, slot], self.delta[:, slot]
        for row in path[self.applied :].tolist() if delta.size else ():
            delta *= fades[:, row, :, None, None]
            delta += keys[:, row, self.key_head, :, None] * updates[:, row, :, None]
        past = conv.shape[1]
        conv[:] = np.concatenate((conv, mixed[:, path[-past:]]), axis=1)[:, -past:]


class KeptStates:
    """States by the key of the block that they stand behind; least recently used ones go first.

    One is taken where a prompt ends, where an answer ends, and where a text parts from a cached one, since the next of
    its kind will part there, too. They are larger than blocks, so not one of each.
    """

    def __init__(self, states: RequestStates):
        self._states, self._most = states, (KEPT - 2) * states.slots  # a running text has two that are not found yet
        self._kept: OrderedDict[bytes, StateCopy] = OrderedDict()
        self._own: list[dict[int, StateCopy]] = [{} for _ in range(states.slots)]  # by the number of blocks before it
        self._wanted: list[set[int]] = [set() for _ in range(states.slots)]

    def get(self, key: bytes) -> StateCopy | None:
        return self._kept.get(key)

    def find(self, keys: Sequence[bytes]) -> int:
        """Return behind how many of a text's cached blocks there is a state to go on from."""
        return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._kept), 0)

    def open(self, slot: int, keys: Sequence[bytes], wanted: set[int]) -> None:
        """Begin a text in a slot, behind the blocks of ``keys``; ``wanted``: after how many blocks states are taken."""
        self._wanted[slot], self._own[slot] = wanted, {}
        if keys:
            self._kept.move_to_end(keys[-1])
            self._states.put(slot, self._kept[keys[-1]])

    def take(self, slots: np.ndarray, committed: np.ndarray, rows: np.ndarray, counts: np.ndarray, decode: int) -> None:
        """Take the states that the last pass's requests have at ends of blocks, before it is committed.

        slots, committed  int64 [B], and a text's tokens before the pass
        rows, counts      as of ``Engine.commit``
        decode            requests that decode; they are the first
        """
        row, after = begins(counts), (committed + counts) // BLOCK
        for i in np.flatnonzero(after * BLOCK > committed).tolist():
            slot, first = int(slots[i]), int(committed[i])
            ends = {int(after[i])} if i < decode else self._wanted[slot] & {*range(first // BLOCK + 1, after[i] + 1)}
            if i < decode:  # an answer's newest one is enough
                self._own[slot].clear()
            for end in ends:
                path = rows[row[i] : row[i] + end * BLOCK - first]
                self._own[slot][end] = self._states.ahead(i, path)

    def publish(self, slot: int, keys: Sequence[bytes]) -> None:
        """Let others find the states of a slot's text behind the blocks of ``keys``."""
        for blocks, state in self._own[slot].items():
            if blocks <= len(keys):
                self.keep(keys[blocks - 1], state)
        self._own[slot] = {}

    def load(self, slot: int, key: bytes, content: bytes) -> None:
        """Let a slot go on from the bytes of a ``StateCopy``, which stands behind the block of ``key``."""
        conv, delta = self._states.conv[:, :1], self._states.delta[:, :1]
        values = np.frombuffer(content, np.float32)
        state = values[: conv.size].reshape(conv.shape), values[conv.size :].reshape(delta.shape)
        self._states.put(slot, state)
        self.keep(key, state)

    def keep(self, key: bytes, state: StateCopy) -> None:
        self._kept[key] = state
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


def parents(call: ForwardBatch) -> np.ndarray:
    """Return the packed row before each token on its path, int64 [N]; -1 - b where that is request b's cached text."""
    longest = int(np.diff(call.seq_begins).max(initial=1))
    if longest > MAX_ROWS:
        raise UserError(f"a request has {longest} tokens in one pass, but a hybrid network takes {MAX_ROWS} at most.")
    found: np.ndarray = _parents(call.seq_begins, call.tree_mask, call.tree_mask_begins)
    return found


@compiled("i8[::1](i4[::1], u1[::1], i4[::1])")
def _parents(seq_begins: np.ndarray, tree_mask: np.ndarray, mask_begins: np.ndarray) -> np.ndarray:
    found = np.empty(seq_begins[-1], np.int64)
    for request in range(len(seq_begins) - 1):
        first, mask = seq_begins[request], mask_begins[request]
        count = seq_begins[request + 1] - first
        causal = mask_begins[request + 1] == mask
        for row in range(count):
            above = row - 1  # parents stand before children: the nearest ancestor is the last
            while above >= 0 and not causal and not tree_mask[mask + row * count + above]:
                above -= 1
            found[first + row] = first + above if above >= 0 else -1 - request
    return found
