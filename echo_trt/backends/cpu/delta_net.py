"""Gated delta-net layers (``models.delta_net``): each node of a tree goes on from the state of the node before it.

A request's state is written behind its first token, which its text has in any case. The states behind other nodes stand
in scratch memory while their branches are walked, and a commit repeats the writing of those that were accepted. So a
node has the bits of plain decoding, and a state is read and written once for a pass without drafts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from echo_trt.backends.cpu.network_file import NetworkFile
from echo_trt.backends.cpu.operators import ONE, ZERO, four, operator, part, share, squares
from echo_trt.backends.cpu.products import Product, products
from echo_trt.backends.cpu.program import Op, Pool, Program
from echo_trt.backends.cpu.vectors import add, divide, exp, fma, load, mul, number, put, same, store, word
from echo_trt.backends.states import MAX_ROWS, RequestStates
from echo_trt.models.hybrid_config import CONV_PAST
from echo_trt.speculation.arrays import begins, compiled
from echo_trt.speculation.pack import ForwardBatch

#: States in scratch memory. A node's largest branch is walked last, where its parent's stood: no tree needs more.
SCRATCH = MAX_ROWS.bit_length()


class DeltaNets:
    """The delta-net layers of a network, which share their buffers and what is planned for a pass.

    capacity  rows of a pass at most
    """

    def __init__(self, header: dict[str, Any], states: RequestStates, capacity: int, pool: Pool):
        config, states.key_head = header["config"], header["key_head"]
        states.follow = self._follow
        self._states, self._pool, self._key_head = states, pool, np.array(states.key_head)
        self._key_heads, self._heads = config["linear_key_heads"], config["linear_value_heads"]
        self._key_dim, self._dim, self._eps = config["linear_key_dim"], config["linear_value_dim"], config["norm_eps"]
        layers, channels, values = len(states.conv), states.conv.shape[-1], self._heads * self._dim
        self._mixed = np.zeros((layers, capacity, channels), np.float32)
        self._keys = np.zeros((layers, capacity, self._key_heads, self._key_dim), np.float32)
        self._updates = np.zeros((layers, capacity, self._heads, self._dim), np.float32)
        self._fades = np.zeros((layers, capacity, self._heads), np.float32)
        self._convolved, self._gates = (np.zeros((capacity, size), np.float32) for size in (channels, values))
        self._output = np.zeros((capacity, values), np.float32)
        self._write, self._decay = np.zeros((2, capacity, -(-self._heads // 16) * 16), np.float32)
        self._scratch = np.zeros((pool.threads, SCRATCH, self._key_dim, self._dim), np.float32)
        self._requests, self._begins = np.zeros(1, np.int64), np.zeros(capacity + 1, np.int64)
        self._slots, self._order, self._from, self._to = np.zeros((4, capacity), np.int64)
        self._before = np.zeros((capacity, CONV_PAST), np.int64)
        self._commit = self._committing(capacity)

    def plan(self, call: ForwardBatch) -> None:
        """Begin a pass, and plan it."""
        parents, slots = self._states.begin(call), self._states.of_requests
        self._requests[0] = len(slots)
        self._begins[: len(slots) + 1], self._slots[: len(slots)] = call.seq_begins, slots
        planned = self._order, self._from, self._to, self._before
        plan_walk(parents, self._begins, self._slots, len(slots), *planned)
        self._states.keep(self._keys, self._updates, self._fades, self._mixed)

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Do what ``RequestStates.commit`` does, by all threads."""
        self._begins[: len(counts) + 1], self._order[: len(rows)] = begins(counts), rows
        self._pool.run(self._commit)

    def _follow(self, slot: int, path: np.ndarray) -> None:
        """Advance a slot along packed rows of the last pass, whose requests are not committed yet."""
        requests, begun, first = self._requests[0], self._begins[:2].copy(), self._slots[0]
        self._requests[0], self._slots[0] = 1, slot
        self.commit(path, np.array([len(path)]))
        self._requests[0], self._begins[:2], self._slots[0] = requests, begun, first

    def mix(
        self, file: NetworkFile, rows: np.ndarray, layer: int, name: str, x: np.ndarray, out: np.ndarray
    ) -> list[Op]:
        """Return the ops that add to ``out`` what the ``layer``-th delta net gives for ``x`` float32 [capacity, H].

        rows  int64 [1], the rows of a pass
        """
        states, heads, keys = self._states, self._heads, self._key_heads
        mixed, channels = self._mixed[layer], self._mixed.shape[-1]
        parts = {"mixed": mixed, "gate": self._gates, "write": self._write[:, :heads], "decay": self._decay[:, :heads]}
        projected = [Product(file.matrix(f"{name}.{part}.weight"), to) for part, to in parts.items()]
        decays = -np.exp(file.array(f"{name}.decay_log")), file.array(f"{name}.decay_bias")
        return [
            *products(x, rows, projected),
            Op.of(
                convolve, rows, mixed, self._before, states.conv[layer], file.array(f"{name}.conv"),
                self._convolved, channels, keys, self._key_dim, heads, self._dim, self._keys[layer],
            ),
            Op.of(
                walk, self._requests, self._begins, self._slots, self._order, self._from, self._to, self._convolved,
                channels, self._write, self._decay, self._write.strides[0], *decays, states.delta[layer],
                self._scratch, self._updates[layer], self._fades[layer], self._output, keys, self._key_dim, heads,
                self._dim, self._key_head,
            ),
            Op.of(
                gate_heads, rows, self._output, self._output.strides[0], self._gates, self._gates.strides[0],
                file.array(f"{name}.norm"), float(self._eps), heads, self._dim,
            ),
            *products(self._output, rows, [Product(file.matrix(f"{name}.output.weight"), out, out)]),
        ]  # fmt: skip

    def _committing(self, capacity: int) -> Program:
        states, channels = self._states, self._mixed.shape[-1]
        op = Op.of(
            advance, self._requests, self._begins, self._slots, self._order, len(states.conv), capacity,
            states.conv.shape[1], states.conv, self._mixed, channels, states.delta, self._keys, self._updates,
            self._fades, self._key_heads, self._key_dim, self._heads, self._dim, self._key_head,
        )  # fmt: skip
        return Program([op])


@part
def tapped(mixed, before, states, taps, row, width, i):
    """Return the sum of a row and those before it, each times its tap, ``i`` bytes on in rows of ``width`` bytes."""
    x = mul(load(mixed + row * width + i), load(taps + CONV_PAST * width + i))
    for back in range(CONV_PAST):
        above = word(before, row * CONV_PAST + back)
        source = mixed + above * width if above >= 0 else states + (-1 - above) * width
        x = fma(load(source + i), load(taps + (CONV_PAST - 1 - back) * width + i), x)
    return x


@operator
def convolve(args, thread, threads):
    """Convolve channels along paths, and make queries and keys of them as long as they are to be.

    rows, mixed, rows before a row, states, taps, out, channels, key heads, their size, value heads, theirs, keys' copy
    """
    mixed, before, states, taps = four(args, 1)
    out, channels, keys, key_dim = four(args, 5)
    heads, dim, copied = word(args, 9), word(args, 10), word(args, 11)
    count, width = 2 * keys + heads, channels * 4
    for unit in share(word(word(args, 0), 0) * count, thread, threads):
        row, head = unit // count, unit % count
        size = key_dim if head < 2 * keys else dim
        begin = 4 * (head * key_dim if head < 2 * keys else 2 * keys * key_dim + (head - 2 * keys) * dim)
        for i in range(begin, begin + 4 * size, 64):
            x = tapped(mixed, before, states, taps, row, width, i)
            store(out + row * width + i, divide(x, add(same(ONE), exp(mul(x, same(-ONE))))))
        if head < 2 * keys:
            at = out + row * width + begin
            length = ONE / np.sqrt(np.float32(key_dim)) if head < keys else ONE
            factor = same(length / np.sqrt(squares(at, key_dim) + np.float32(1e-6)))
            for i in range(0, 4 * key_dim, 64):
                value = mul(load(at + i), factor)
                store(at + i, value)
                if head >= keys:
                    store(copied + (row * keys + head - keys) * key_dim * 4 + i, value)


@part
def _written(state, i, fade, key, update):
    """Return a part of row ``i`` of a state behind a token; a commit must round as a pass does."""
    return add(mul(load(state + i), fade), mul(key, update))


@part
def _node(query, key, value, beta, fade, state, after, update, out, key_dim, dim):
    """Write the state ``after`` a token that goes on from a ``state``, how it was updated, and the token's output."""
    step, faded, strength = dim * 4, same(fade), same(beta)
    for c in range(0, step, 128):
        a0 = a1 = o0 = o1 = same(ZERO)
        for i in range(key_dim):
            k = same(number(key + 4 * i))
            a0, a1 = fma(k, load(state + i * step + c), a0), fma(k, load(state + i * step + c + 64), a1)
        minus = same(-fade)
        u0 = mul(fma(a0, minus, load(value + c)), strength)
        u1 = mul(fma(a1, minus, load(value + c + 64)), strength)
        store(update + c, u0)
        store(update + c + 64, u1)
        for i in range(key_dim):
            k, q, at = same(number(key + 4 * i)), same(number(query + 4 * i)), i * step + c
            s0, s1 = _written(state, at, faded, k, u0), _written(state, at + 64, faded, k, u1)
            store(after + at, s0)
            store(after + at + 64, s1)
            o0, o1 = fma(q, s0, o0), fma(q, s1, o1)
        store(out + c, o0)
        store(out + c + 64, o1)


@operator
def walk(args, thread, threads):
    """Walk each request's tree, head by head: see ``plan_walk``.

    requests, begins, slots, order, from, to, convolved, channels, write, decay, bytes of their rows, rates of decay,
    their biases, states, scratch, updates, fades, out, key heads, their size, value heads, theirs, their key heads
    """
    bounds, slots, order = word(args, 1), word(args, 2), word(args, 3)
    sources, targets, convolved, channels = four(args, 4)
    write, decay, stride, rates = four(args, 8)
    biases, states, scratch, updates = four(args, 12)
    fades, out, keys, key_dim = four(args, 16)
    heads, dim, key_head = word(args, 20), word(args, 21), word(args, 22)
    size, key_size = key_dim * dim * 4, keys * key_dim * 4
    own_scratch = scratch + thread * SCRATCH * size
    for request in range(word(word(args, 0), 0)):
        for head in share(heads, thread, threads):
            own = states + (word(slots, request) * heads + head) * size
            for n in range(word(bounds, request), word(bounds, request + 1)):
                row, source, target = word(order, n), word(sources, n), word(targets, n)
                at, index = convolved + row * channels * 4, row * heads + head
                query = at + word(key_head, head) * key_dim * 4
                beta = ONE / (ONE + np.exp(-number(write + row * stride + 4 * head)))
                power = number(decay + row * stride + 4 * head) + number(biases + 4 * head)
                if power < np.float32(20):
                    power = np.log1p(np.exp(power))
                fade = np.exp(number(rates + 4 * head) * power)
                put(fades + 4 * index, fade)
                before = own_scratch + (source - 1) * size if source else own
                after = own_scratch + (target - 1) * size if target else own
                value, position = at + 2 * key_size + head * dim * 4, index * dim * 4
                _node(
                    query, query + key_size, value, beta, fade, before, after, updates + position, out + position,
                    key_dim, dim,
                )  # fmt: skip


@operator
def advance(args, thread, threads):
    """Commit paths: requests, begins, slots, path rows, layers, capacity, slots in all, and what ``DeltaNets`` has."""
    bounds, slots, rows = word(args, 1), word(args, 2), word(args, 3)
    layers, capacity, number_of_slots, conv = four(args, 4)
    mixed, channels, states, keys_at = four(args, 8)
    updates, fades, keys, key_dim = four(args, 12)
    heads, dim, key_head = word(args, 16), word(args, 17), word(args, 18)
    width, step, size = channels * 4, dim * 4, key_dim * dim * 4
    units = layers * heads
    for unit in share(word(word(args, 0), 0) * units, thread, threads):
        request, layer, head = unit // units, unit % units // heads, unit % heads
        begin, end, slot = word(bounds, request), word(bounds, request + 1), word(slots, request)
        state = states + ((layer * number_of_slots + slot) * heads + head) * size
        for n in range(begin + 1, end):
            index = layer * capacity + word(rows, n)
            faded, update = same(number(fades + (index * heads + head) * 4)), updates + (index * heads + head) * step
            key = keys_at + (index * keys + word(key_head, head)) * key_dim * 4
            for i in range(key_dim):
                k = same(number(key + 4 * i))
                for c in range(i * step, i * step + step, 64):
                    store(state + c, _written(state, c, faded, k, load(update + c - i * step)))
        past = conv + (layer * number_of_slots + slot) * CONV_PAST * width
        for n in range(CONV_PAST if head == 0 else 0):
            at = end - begin + n  # of the cached rows and the path behind them
            row = word(rows, begin + at - CONV_PAST) if at >= CONV_PAST else 0
            source = mixed + (layer * capacity + row) * width if at >= CONV_PAST else past + at * width
            for i in range(0, width, 64):
                store(past + n * width + i, load(source + i))


@operator
def gate_heads(args, thread, threads):
    """Norm heads and multiply them by their gates' SiLU, in place; without a norm, by their gates' sigmoid.

    rows, heads, bytes of a row, gates, bytes of theirs, norm, eps, how many heads, their size
    """
    values, stride, gates, gate_stride = four(args, 1)
    norm, eps, heads, dim = word(args, 5), number(args + 48), word(args, 7), word(args, 8)
    for unit in share(word(word(args, 0), 0) * heads, thread, threads):
        row, begin = unit // heads, unit % heads * dim * 4
        at, factor = values + row * stride + begin, same(ONE)
        if norm:
            factor = same(ONE / np.sqrt(squares(at, dim) / np.float32(dim) + eps))
        for i in range(0, 4 * dim, 64):
            gate = load(gates + row * gate_stride + begin + i)
            share_of = divide(gate if norm else same(ONE), add(same(ONE), exp(mul(gate, same(-ONE)))))
            x = mul(load(at + i), factor)
            store(at + i, mul(mul(x, load(norm + i)) if norm else x, share_of))


@compiled("void(i8[::1], i8[::1], i8[::1], i8, i8[::1], i8[::1], i8[::1], i8[:, ::1])")
def plan_walk(parents, bounds, slots, requests, order, sources, targets, before):
    """Plan how trees are walked, depth first, and where the state behind a node stands meanwhile.

    order             int64 [N], packed rows, request by request
    sources, targets  int64 [N] likewise, of the state before a node and of the one behind it: 0 is the request's own,
                      others are in scratch memory
    before            int64 [N, 3], a row's predecessors on its path, nearest first: packed rows, or -1 - i for row i of
                      all requests' convolution states
    """
    sizes, standing = np.ones(len(parents), np.int64), np.zeros(len(parents), np.int64)
    heavy = np.full(len(parents), -1)
    for row in range(len(parents) - 1, -1, -1):
        above = parents[row]
        if above >= 0:
            sizes[above] += sizes[row]
            if heavy[above] < 0 or sizes[row] > sizes[heavy[above]]:
                heavy[above] = row
    waiting = np.empty(len(parents), np.int64)
    for request in range(requests):
        begin, end, count = bounds[request], bounds[request + 1], 0
        for row in range(end - 1, begin - 1, -1):
            if parents[row] < 0:
                waiting[count] = row
                count += 1
        for n in range(begin, end):
            count -= 1
            row = waiting[count]
            above = parents[row]
            order[n], sources[n] = row, standing[above] if above >= 0 else 0
            if above >= 0:
                standing[row] = standing[above] + (standing[above] == 0 or heavy[above] != row)
            targets[n] = standing[row]
            if heavy[row] >= 0:
                waiting[count] = heavy[row]
                count += 1
                for child in range(row + 1, end):
                    if parents[child] == row and child != heavy[row]:
                        waiting[count] = child
                        count += 1
        for row in range(begin, end):
            above = row
            missing = 0
            for back in range(CONV_PAST):
                above = parents[above] if above >= 0 else above
                if above >= 0:
                    before[row, back] = above
                else:
                    before[row, back] = -1 - (CONV_PAST * slots[request] + CONV_PAST - 1 - missing)
                    missing += 1
