"""Mixtures of experts: rows are sorted by the experts that they choose, and each chosen expert multiplies its rows.

A row's experts, their weights and the order of their sum depend on the row alone, as its bits do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from echo_trt.backends.cpu.formats import AHEAD, PackedWeights
from echo_trt.backends.cpu.network_file import NetworkFile
from echo_trt.backends.cpu.operators import ZERO, activate, four, operator, share
from echo_trt.backends.cpu.products import Product, Rounded, products
from echo_trt.backends.cpu.program import Op
from echo_trt.backends.cpu.tiles import ROUNDED
from echo_trt.backends.cpu.vectors import (
    add,
    call,
    exp,
    fma,
    load,
    number,
    put,
    put_word,
    same,
    store,
    total,
    within,
    word,
)

#: An expert's rows begin at a multiple of it, as kernels' tiles do; a kernel may look at as many rows behind the last.
ALIGNED, SLACK = ROUNDED, 32


class Mixtures:
    """The mixtures of a network, which share their buffers; a "pick" is an expert that a row chose.

    config    of the network
    rows      int64 [1], the rows of a pass
    capacity  how many there are at most
    """

    def __init__(self, config: dict[str, Any], rows: np.ndarray, capacity: int):
        self._rows, self._config = rows, config
        self._hidden, self._size = config["hidden_size"], config["expert_size"]
        self._top_k, self._count = config["experts_per_token"], config["num_experts"]
        picks = capacity * self._top_k
        maximum = _padded(picks + (ALIGNED - 1) * min(self._count, picks) + SLACK)
        width, self._gated = _padded(self._hidden), _padded(self._size)
        self._scores = np.zeros((capacity, _padded(self._count)), np.float32)
        self._weights = np.zeros((capacity, self._top_k), np.float32)
        self._picks, self._positions = np.zeros((2, capacity, self._top_k), np.int64)
        self._counts, self._next = np.zeros((2, self._count), np.int64)  # of an expert's rows; where its next one goes
        self._chosen = np.zeros(1 + self._count, np.int64)  # how many experts were picked, and which
        sizes = {"gathered": width, "both": 2 * self._gated, "active": self._gated, "outputs": width}
        self._at = {name: np.zeros((maximum, size), np.float32) for name, size in sizes.items()}

    def mix(
        self, file: NetworkFile, name: str, x: np.ndarray, out: np.ndarray, plus: np.ndarray | None = None
    ) -> list[Op]:
        """Return the ops that write to ``out`` what the experts of a layer give for ``x``, plus what is there.

        x     float32 [capacity, >= hidden]
        plus  None, or ``out``
        """
        at, k = self._at, self._top_k
        gate, up = at["both"][:, : self._size], at["both"][:, self._gated : self._gated + self._size]
        stacks = {part: file.matrix(f"{name}.{part}.weight") for part in ("gate", "up", "down")}
        router = Product(file.matrix(f"{name}.router.weight"), self._scores)
        scored = products(x, self._rows, [router])
        records = _Records(self._counts, at, self._chosen)
        one = self._counts[:1]
        rows_in = [Product(_first(stacks[part], self._size), to) for part, to in (("gate", gate), ("up", up))]
        rows_out = [Product(_first(stacks["down"], self._hidden), at["outputs"])]
        experts = [
            *products(at["gathered"], one, rows_in),
            Op.of(activate, one, at["both"], at["active"], self._gated, 0),
            *products(at["active"], one, rows_out),
        ]
        each = [records.each(op) for op in experts]
        width = at["outputs"].shape[1]
        return [
            *scored,
            Op.of(
                route, self._rows, self._scores, self._scores.strides[0], self._count, k,
                int(self._config["norm_expert_weights"]), self._picks, self._weights,
            ),
            records.assign(self._rows, self._picks, self._positions, self._next, k),
            Op.of(gather, self._rows, x, x.strides[0], at["gathered"], width, k, self._positions),
            *each,
            Op.of(
                combine, self._rows, plus, out, out.strides[0], at["outputs"], width, k, self._positions, self._weights,
            ),
        ]  # fmt: skip


class _Records:
    """Records of native functions for each expert, made of one of the first expert; and what a pass writes to them.

    An expert's matrices stand behind each other. Where its rows begin is known in a pass.
    """

    def __init__(self, counts: np.ndarray, buffers: dict[str, np.ndarray], chosen: np.ndarray):
        self._counts, self._chosen = counts, chosen
        self._buffers = [(each.ctypes.data, each.nbytes, each.strides[0]) for each in buffers.values()]
        self._words: list[tuple[int, int, int, int]] = []  # where, bytes of a record, value for row 0, bytes of a row
        self._keeps: list[Any] = []

    def each(self, op: Op) -> Op:
        """Return an op that does for each chosen expert what ``op`` does for the first one."""
        records = np.repeat(op.args[None], len(self._counts), 0)
        steps, moving = {self._counts.ctypes.data: self._counts.strides[0]}, list(self._buffers)
        for kept in op.keeps:
            if isinstance(kept, PackedWeights):
                count = len(self._counts)
                steps[kept.quants.ctypes.data] = (len(kept.quants) - AHEAD) // count
                steps[kept.scales.ctypes.data] = len(kept.scales) // count
            elif isinstance(kept, Rounded):
                moving += [(kept.factors.ctypes.data, len(kept.factors), kept.factor_row)]
                moving += [(kept.planes.ctypes.data, len(kept.planes), kept.factor_row)]
                moving += [(kept.values.ctypes.data, len(kept.values), kept.row)]
        for i, value in enumerate(op.args.tolist()):
            at = records.ctypes.data + records.itemsize * i, records.strides[0]
            records[:, i] += steps.get(value, 0) * np.arange(len(records))
            self._words += [(*at, value, row) for begin, size, row in moving if begin <= value < begin + size]
            if i == op.claims:
                self._words.append((*at, 0, 0))
        self._keeps += [records, *op.keeps]
        args = np.array([op.address, records.ctypes.data, records.strides[0], self._chosen.ctypes.data])
        return Op(each.address, args, op.joins, (each, records, self._chosen, *op.keeps))

    def assign(self, rows: np.ndarray, picks: np.ndarray, positions: np.ndarray, following: np.ndarray, k: int) -> Op:
        words = np.array(self._words)
        return Op.of(
            assign, rows, picks, k, self._counts, following, len(following), self._chosen, positions, words, len(words),
            keeps=self._keeps,
        )  # fmt: skip


def _first(stack: PackedWeights, rows: int) -> PackedWeights:
    """Return the first of the matrices [rows, K] that stand behind each other."""
    return replace(stack, rows=rows)


def _padded(size: int, unit: int = 32) -> int:
    return -(-size // unit) * unit


@operator
def each(args, thread, threads):
    """Call a function with the record of each chosen expert: function, records, bytes of one, chosen."""
    function, records, size, chosen = four(args, 0)
    for i in range(word(chosen, 0)):
        call(function, records + word(chosen, 1 + i) * size, thread, threads)


@operator
def route(args, thread, threads):
    """Choose the experts of rows, the first of equal ones, and weigh them by a softmax.

    rows, scores, bytes of a row, experts, how many are chosen, whether their weights' sum is 1, chosen, weights
    """
    scores, stride, count, k = four(args, 1)
    normalise, picks, weights = word(args, 5), word(args, 6), word(args, 7)
    for row in share(word(word(args, 0), 0), thread, threads):
        at, chosen, weight = scores + row * stride, picks + row * k * 8, weights + row * k * 4
        found = 0
        for expert in range(count):
            value = number(at + 4 * expert)
            if found == k and not value > number(weight + 4 * (k - 1)):
                continue
            slot = found if found < k else k - 1
            while slot > 0 and number(weight + 4 * (slot - 1)) < value:
                put(weight + 4 * slot, number(weight + 4 * (slot - 1)))
                put_word(chosen + 8 * slot, word(chosen, slot - 1))
                slot -= 1
            put(weight + 4 * slot, value)
            put_word(chosen + 8 * slot, expert)
            found = min(found + 1, k)
        peak, sums = same(-number(weight)), same(ZERO)
        for i in range(0, count, 16):
            powers = exp(add(load(at + 4 * i), peak))
            store(at + 4 * i, powers)
            sums = add(sums, within(powers, 0, count - i, ZERO))
        whole = total(sums)
        if normalise:
            whole = ZERO
            for slot in range(k):
                whole += number(at + 4 * word(chosen, slot))
        for slot in range(k):
            put(weight + 4 * slot, number(at + 4 * word(chosen, slot)) / whole)


@operator
def assign(args, thread, threads):
    """Sort rows by the experts that they chose, and write to the experts' records where theirs begin.

    rows, picks, how many a row has, experts' rows, their next positions, experts, chosen, positions, words, how many
    """
    if thread:
        return
    picks, k, counts, following = four(args, 1)
    (experts, chosen, positions, words), count = four(args, 5), word(args, 9)
    for expert in range(experts):
        put_word(counts + 8 * expert, 0)
    every = word(word(args, 0), 0) * k
    for pick in range(every):
        at = word(picks, pick) * 8
        put_word(counts + at, word(counts + at, 0) + 1)
    begin, found = 0, 0
    for expert in range(experts):
        if word(counts, expert) == 0:
            continue
        found += 1
        put_word(chosen + 8 * found, expert)
        put_word(following + 8 * expert, begin)
        for i in range(count):
            where, size, base, row = four(words, 4 * i)
            put_word(where + size * expert, base + begin * row)
        begin += (word(counts, expert) + ALIGNED - 1) // ALIGNED * ALIGNED
    put_word(chosen, found)
    for pick in range(every):
        at = following + word(picks, pick) * 8
        put_word(positions + 8 * pick, word(at, 0))
        put_word(at, word(at, 0) + 1)


@operator
def gather(args, thread, threads):
    """Copy rows to the positions of their picks.

    rows, source, bytes of its rows, out, size, picks of a row, positions
    """
    source, stride, out, size = four(args, 1)
    k, positions = word(args, 5), word(args, 6)
    for pick in share(word(word(args, 0), 0) * k, thread, threads):
        at, target = source + pick // k * stride, out + word(positions, pick) * size * 4
        for i in range(0, 4 * size, 64):
            store(target + i, load(at + i))


@operator
def combine(args, thread, threads):
    """Add the outputs of a row's experts by their weights, the heaviest first.

    rows, what is added to or none, out, bytes of its rows, outputs, size, picks of a row, positions, weights
    """
    plus, out, stride, outputs = four(args, 1)
    size, k, positions, weights = four(args, 5)
    parts = size // 16
    for unit in share(word(word(args, 0), 0) * parts, thread, threads):
        row, i = unit // parts, unit % parts * 64
        summed = load(plus + row * stride + i) if plus else same(ZERO)
        for pick in range(row * k, row * k + k):
            at = outputs + word(positions, pick) * size * 4 + i
            summed = fma(load(at), same(number(weights + 4 * pick)), summed)
        store(out + row * stride + i, summed)
