"""Sums of several rows at once: every row's numbers times the same 32 numbers of keys or values.

A row has two vectors of sums, which stay in registers, and its sums have the order of the calls. By kind of pool:

PAIRS   bf16, two numbers of a sum beside each other; a row's numbers are bf16, too, and two are multiplied at once
WIDE    float32
HALVES  the pool of PAIRS on a CPU that has no products of bf16: a row's numbers are float32
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from echo_trt.backends.cpu.builder import BF16
from echo_trt.backends.cpu.machine_code import host_features
from echo_trt.backends.cpu.vectors import LANES, VECTOR, operation, spread

PAIRS, WIDE, HALVES = range(3)
HAS_PAIRS = host_features().issuperset(("avx512bf16", "avx512bw"))
#: Rows of a tile: as many as 32 registers hold the sums of; where registers are shorter, half of them.
ROWS = 8 if "avx512f" in host_features() else 4
_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS, _HALVES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES), ir.VectorType(BF16, 2 * LANES)
BYTES = 4 * LANES  # of a vector


def _read(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: ir.Value | int = 0) -> ir.Value:
    address = b.add(address, offset if isinstance(offset, ir.Value) else _LONG(offset))
    return b.load(b.inttoptr(address, kind.as_pointer()), align=4)


def _call(b: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def _terms(b: ir.IRBuilder, at: ir.Value, kind: int) -> list[list[ir.Value]]:
    """Read 32 numbers, or of pairs 32 of each: for each number of a row, two vectors to multiply it by."""
    if kind == WIDE:
        return [[_read(b, at, _FLOATS, BYTES * n) for n in (0, 1)]]
    words = [_read(b, at, _WORDS, BYTES * n) for n in (0, 1)]
    if kind == PAIRS:
        return [[b.bitcast(word, _HALVES) for word in words]]
    first = [b.shl(word, ir.Constant(_WORDS, [16] * LANES)) for word in words]
    second = [b.and_(word, ir.Constant(_WORDS, [0xFFFF0000] * LANES)) for word in words]
    return [[b.bitcast(word, _FLOATS) for word in both] for both in (first, second)]


def adding(rows: int, kind: int) -> Any:
    """Make ``added(sums, at, numbers, stride)``: the sums of ``rows`` rows and the products of a row's next number.

    at       address of what is multiplied: 32 float32 numbers, or 32 pairs of bf16
    numbers  address of the first row's number, or pair; ``stride`` bytes lead to the next row's
    """
    state = types.UniTuple(VECTOR, 2 * rows)

    def build(b: ir.IRBuilder, sums: ir.Value, at: ir.Value, numbers: ir.Value, stride: ir.Value) -> ir.Value:
        result = [b.extract_value(sums, n) for n in range(2 * rows)]
        terms = _terms(b, at, kind)
        for row in range(rows):
            offset = b.mul(stride, _LONG(row))
            for n, both in enumerate(terms):
                if kind == PAIRS:
                    number = b.bitcast(spread(b, _read(b, numbers, _INT, offset), _WORDS), _HALVES)
                else:
                    number = spread(b, _read(b, b.add(numbers, _LONG(4 * n)), _FLOAT, offset), _FLOATS)
                for half, term in enumerate(both):
                    total = result[2 * row + half]
                    if kind == PAIRS:
                        total = _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", total, number, term)
                    else:
                        total = _call(b, "llvm.fma.v16f32", number, term, total)
                    result[2 * row + half] = total
        return cgutils.pack_array(b, result)

    return operation(state, state, *[types.int64] * 3)(build)


def reading(rows: int) -> Any:
    """Make ``read(at, stride, factors)``: the two vectors of each row from ``at`` on, by the row's float32 factor."""

    def build(b: ir.IRBuilder, at: ir.Value, stride: ir.Value, factors: ir.Value) -> ir.Value:
        result = []
        for row in range(rows):
            factor = spread(b, _read(b, factors, _FLOAT, 4 * row), _FLOATS)
            begin = b.add(at, b.mul(stride, _LONG(row)))
            result += [b.fmul(_read(b, begin, _FLOATS, BYTES * n), factor) for n in (0, 1)]
        return cgutils.pack_array(b, result)

    return operation(types.UniTuple(VECTOR, 2 * rows), *[types.int64] * 3)(build)


def nothing(rows: int) -> Any:
    """Make ``none()``: sums that are 0."""

    def build(b: ir.IRBuilder) -> ir.Value:
        return cgutils.pack_array(b, [ir.Constant(_FLOATS, [0.0] * LANES)] * 2 * rows)

    return operation(types.UniTuple(VECTOR, 2 * rows))(build)


def writing(rows: int) -> Any:
    """Make ``write(sums, at, stride)``: write each row's two vectors."""

    def build(b: ir.IRBuilder, sums: ir.Value, at: ir.Value, stride: ir.Value) -> None:
        for n in range(2 * rows):
            address = b.add(at, b.add(b.mul(stride, _LONG(n // 2)), _LONG(n % 2 * BYTES)))
            b.store(b.extract_value(sums, n), b.inttoptr(address, _FLOATS.as_pointer()), align=4)

    return operation(types.void, types.UniTuple(VECTOR, 2 * rows), types.int64, types.int64)(build)
