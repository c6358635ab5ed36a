"""States of delta-net layers beside the KV pool, in the host's memory: a slot for each running request, and copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.speculation.arrays import begins, compiled
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from echo_trt.speculation.paths import COMMIT_OUTPUTS, MAX_ROWS, tree_inputs

#: Tokens of a path up to which a state is updated row by row. Larger: longer paths miss the matrix product.
SHORT = 8
#: Copies of states that a prefix cache keeps for each slot. Larger: more conversations are found, in more memory.
KEPT = 3


class KeepsStates(Engine):
    """The trait of an engine whose network may have states beside KV rows.

    A run reads the states of its ``ForwardBatch.slots``, and starts from zero where a request has no past.
    """

    states: RequestStates | None = None

    def _open_states(self, shapes: Mapping[str, tuple[int, ...]], slots: int) -> None:
        """Make states of ``slots`` requests; ``shapes``: of a request's by input name, kind.layer, none without any."""
        if shapes:
            self.states, self.paged, self.longest = RequestStates(shapes, slots), False, MAX_ROWS

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        if self.states:
            self.states.commit(rows, counts)


#: A request's states of convolutions [L, 1, 3, C] and delta-nets [L, 1, H, dk, dv], float32.
StateCopy = tuple[np.ndarray, np.ndarray]


class RequestStates:
    """Convolution and delta-net states of ``slots`` requests, float32, whose memory is taken as they are written.

    conv   [L, S, 3, C]
    delta  [L, S, H, dk, dv]
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], slots: int):
        self.slots = slots
        self.conv, self.delta = (self._zeros(shapes, kind) for kind in ("conv_state", "delta_state"))
        self.span = slice(0, 1)  # slots whose states the last pass read
        self._seq_begins = self._slots = np.zeros(0, np.int64)
        self._outputs: tuple[np.ndarray, ...] = ()

    def _zeros(self, shapes: Mapping[str, tuple[int, ...]], kind: str) -> np.ndarray:
        found = [shape for name, shape in shapes.items() if name.startswith(f"{kind}.")]
        return np.zeros((len(found), self.slots, *found[0]), np.float32)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The states of ``span`` by input name, in place."""
        kinds = (("conv_state", self.conv), ("delta_state", self.delta))
        return {f"{kind}.{i}": part[self.span] for kind, parts in kinds for i, part in enumerate(parts)}

    def begin(self, call: ForwardBatch, size: int) -> dict[str, np.ndarray]:
        """Return the inputs of a pass padded to ``size`` rows; a request without past begins with states of zero.

        A pass reads the states from its first to its last slot where they are, since a copy of states takes as long as
        to read them.
        """
        slots = call.slots
        if len(slots) == 0:  # a call without requests of its own, such as a measurement's
            slots = np.arange(len(call.past_lens))
        new = slots[call.past_lens == 0]
        self.conv[:, new] = 0
        self.delta[:, new] = 0
        self._slots, self._seq_begins = slots, call.seq_begins
        self.span = slice(int(slots.min()), int(slots.max()) + 1)
        return tree_inputs(call, slots - self.span.start, self.span.stop - self.span.start, size)

    def keep(self, outputs: dict[str, Any]) -> None:
        """Keep the pass's ``COMMIT_OUTPUTS`` for ``commit``."""
        self._outputs = tuple(outputs[name] for name in COMMIT_OUTPUTS)

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Advance the last pass's requests over the packed ``rows``, ``counts`` int64 [B] of them, in path order."""
        ends = begins(counts)
        for request in np.flatnonzero(counts):
            slot, path = int(self._slots[request]), rows[ends[request] : ends[request + 1]]
            self._follow((self.conv, self.delta), slot, request, path)

    def ahead(self, request: int, path: np.ndarray) -> StateCopy:
        """Return the states that a request of the last pass, not yet committed, has behind packed rows ``path``."""
        slot = int(self._slots[request])
        state = self.conv[:, slot : slot + 1].copy(), self.delta[:, slot : slot + 1].copy()
        self._follow(state, 0, request, path)
        return state

    def put(self, slot: int, state: StateCopy) -> None:
        """Let a slot go on from a ``state`` that ``ahead`` has returned."""
        self.conv[:, slot : slot + 1], self.delta[:, slot : slot + 1] = state

    def _follow(self, state: StateCopy, slot: int, request: int, path: np.ndarray) -> None:
        """Advance the ``slot`` of a ``state`` in place, along a path of a request's packed rows."""
        (conv, delta), (keys, updates, decays, mixed) = state, self._outputs
        nodes, tree = path - self._seq_begins[request], int(self._slots[request]) - self.span.start
        if len(path) <= SHORT:
            _advance(delta, keys, updates, decays, slot, tree, nodes)
        else:
            total = decays[:, tree][..., nodes]  # [L, H, n]
            kept = np.exp(total[..., -1:] - total)[..., None]
            written = np.swapaxes(keys[:, tree][:, :, nodes] * kept, -1, -2) @ updates[:, tree][:, :, nodes]
            delta[:, slot] = delta[:, slot] * np.exp(total[..., -1])[..., None, None] + written
        text = np.concatenate((conv[:, slot], mixed[:, path]), axis=1)
        conv[:, slot] = text[:, -conv.shape[2] :]


class KeptStates:
    """States by the key of the block that they stand behind; least recently used ones go first.

    One is taken where a prompt ends, where an answer ends, and where a text parts from a cached one, since the next of
    its kind will part there, too. They are larger than blocks, so not one of each.
    """

    def __init__(self, states: RequestStates):
        self._states, self._most = states, (KEPT - 1) * states.slots  # and a running text has one that is not yet found
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


@compiled("void(f4[:, :, :, :, ::1], f4[:, :, :, :, :], f4[:, :, :, :, :], f4[:, :, :, :], i8, i8, i8[::1])")
def _advance(
    states: np.ndarray,
    keys: np.ndarray,
    updates: np.ndarray,
    decays: np.ndarray,
    slot: int,
    tree: int,
    nodes: np.ndarray,
) -> None:
    """Update the states of ``slot`` by the path ``nodes`` int64 [n]; each number is read and written once."""
    layers, _, heads, height, width = states.shape
    kept = np.empty(len(nodes), np.float32)
    for layer in range(layers):
        for head in range(heads):
            total = decays[layer, tree, head, nodes[-1]]
            fade = np.exp(total)
            for n in range(len(nodes)):
                kept[n] = np.exp(total - decays[layer, tree, head, nodes[n]])
            for i in range(height):
                row = states[layer, slot, head, i]
                for column in range(width):
                    row[column] *= fade
                for n in range(len(nodes)):
                    update = updates[layer, tree, head, nodes[n]]
                    weight = keys[layer, tree, head, nodes[n], i] * kept[n]
                    for column in range(width):
                        row[column] += weight * update[column]
