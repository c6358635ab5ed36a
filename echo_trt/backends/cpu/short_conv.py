"""Gated short convolutions (``models.lfm2``), along the paths of trees."""

from __future__ import annotations

from typing import Any

import numpy as np

from echo_trt.backends.cpu.delta_net import plan_walk, tapped
from echo_trt.backends.cpu.network_file import NetworkFile
from echo_trt.backends.cpu.operators import four, operator, share
from echo_trt.backends.cpu.products import Product, products
from echo_trt.backends.cpu.program import Op, Pool
from echo_trt.backends.cpu.vectors import load, mul, store, word
from echo_trt.backends.states import RequestStates
from echo_trt.models.hybrid_config import CONV_PAST
from echo_trt.speculation.pack import ForwardBatch


class ShortConvs:
    """The short convolutions of a network, which share their buffers and what is planned for a pass.

    capacity  rows of a pass at most
    """

    def __init__(self, header: dict[str, Any], states: RequestStates, capacity: int, pool: Pool):
        self._states, hidden = states, header["config"]["hidden_size"]
        self._mixed = np.zeros((len(states.conv), capacity, hidden), np.float32)
        self._projected = np.zeros((capacity, 3 * hidden), np.float32)
        self._output = np.zeros((capacity, hidden), np.float32)
        self._before = np.zeros((capacity, CONV_PAST), np.int64)
        self._walk = np.zeros((3, capacity), np.int64)
        none = np.zeros((len(states.conv), capacity, 0, 0), np.float32)
        states.keep(none, none, none.reshape(len(none), capacity, 0), self._mixed)

    def plan(self, call: ForwardBatch) -> None:
        """Begin a pass, and plan it."""
        parents, slots = self._states.begin(call), np.asarray(self._states.of_requests, np.int64)
        plan_walk(parents, call.seq_begins.astype(np.int64), slots, len(slots), *self._walk, self._before)

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        self._states.commit(rows, counts)

    def mix(
        self, file: NetworkFile, rows: np.ndarray, layer: int, name: str, x: np.ndarray, out: np.ndarray
    ) -> list[Op]:
        """Return the ops that add to ``out`` what the ``layer``-th convolution gives for ``x`` float32 [capacity, H].

        rows  int64 [1], the rows of a pass
        """
        mixed, projected, hidden = self._mixed[layer], self._projected, self._output.shape[1]
        taps, states = file.array(f"{name}.conv"), self._states.conv[layer]
        return [
            *products(x, rows, [Product(file.matrix(f"{name}.project.weight"), projected)]),
            Op.of(gate_inputs, rows, projected, mixed, hidden),
            Op.of(convolve_gated, rows, mixed, self._before, states, taps, projected, self._output, hidden),
            *products(self._output, rows, [Product(file.matrix(f"{name}.output.weight"), out, out)]),
        ]


@operator
def gate_inputs(args, thread, threads):
    """Multiply what is convolved by the gate before it: rows, projected (gates before, gates after, inputs), out, H."""
    (projected, out), width = (word(args, 1), word(args, 2)), word(args, 3) * 4
    for row in share(word(word(args, 0), 0), thread, threads):
        at = projected + row * 3 * width
        for i in range(0, width, 64):
            store(out + row * width + i, mul(load(at + i), load(at + 2 * width + i)))


@operator
def convolve_gated(args, thread, threads):
    """Convolve along paths, and multiply by the gate behind it.

    rows, mixed, rows before a row, states, taps, projected, out, H
    """
    mixed, before, states, taps = four(args, 1)
    projected, out, width = word(args, 5), word(args, 6), word(args, 7) * 4
    for row in share(word(word(args, 0), 0), thread, threads):
        gate = projected + row * 3 * width + width
        for i in range(0, width, 64):
            x = tapped(mixed, before, states, taps, row, width, i)
            store(out + row * width + i, mul(x, load(gate + i)))
