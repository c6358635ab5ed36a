"""States of delta-net layers: a slot for each running request, beside the KV pool, in the host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.speculation.arrays import begins, compiled
from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.paths import COMMIT_OUTPUTS, MAX_ROWS, tree_inputs

#: Tokens of a path up to which a state is updated row by row. Larger: longer paths miss the matrix product.
SHORT = 8


class KeepsStates(Engine):
    """The trait of an engine whose network may have states beside KV rows.

    A run reads the states of its ``ForwardBatch.slots``, and starts from zero where a request has no past.
    """

    _states: RequestStates | None = None

    def _open_states(self, shapes: Mapping[str, tuple[int, ...]], slots: int) -> None:
        """Make states of ``slots`` requests; ``shapes``: of a request's by input name, kind.layer, none without any."""
        if shapes:
            self._states, self.paged, self.longest = RequestStates(shapes, slots), False, MAX_ROWS

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        if self._states:
            self._states.commit(rows, counts)


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
        keys, updates, decays, mixed = self._outputs
        ends = begins(counts)
        for request in np.flatnonzero(counts):
            slot, path = int(self._slots[request]), rows[ends[request] : ends[request + 1]]
            nodes, tree = path - self._seq_begins[request], slot - self.span.start
            if len(path) <= SHORT:
                _advance(self.delta, keys, updates, decays, slot, tree, nodes)
            else:
                total = decays[:, tree][..., nodes]  # [L, H, n]
                kept = np.exp(total[..., -1:] - total)[..., None]
                written = np.swapaxes(keys[:, tree][:, :, nodes] * kept, -1, -2) @ updates[:, tree][:, :, nodes]
                self.delta[:, slot] = self.delta[:, slot] * np.exp(total[..., -1])[..., None, None] + written
            text = np.concatenate((self.conv[:, slot], mixed[:, path]), axis=1)
            self.conv[:, slot] = text[:, -self.conv.shape[2] :]


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
