"""Vectors of sixteen float32 numbers in numba's functions, read from addresses and written to them.

A sum has the order that is written here, on any CPU. A compiler may not reorder sums of numbers, and so would not make
vectors of them by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

LANES = 16
_FLOAT = ir.FloatType()
_FLOATS, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, ir.IntType(32), ir.IntType(16)))
_LOWEST, _HIGHEST = -87.0, 88.0  # between them the exponential is a normal number
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
#: Of (exp(r) - 1 - r) / r^2 for |r| up to ln(2) / 2, the highest power first.
_POLYNOMIAL = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_default(_Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector):
        super().__init__(manager, kind, _FLOATS)


VECTOR = _Vector()
_ONE, _TWO, _THREE = ([VECTOR] * count for count in (1, 2, 3))


def _built(signature: Any, build: Callable[..., ir.Value]) -> Any:
    """Return what an intrinsic returns: ``build`` makes LLVM's instructions from a builder and the arguments."""
    return signature, lambda context, builder, signature, values: build(builder, *values)


def _constant(value: Any, kind: ir.VectorType = _FLOATS) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32"), values)


def _at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def word(context: Any, address: Any, index: Any) -> Any:
    """Return the int64 number ``index`` behind an address."""

    def build(b: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
        return b.load(b.gep(_at(b, address, ir.IntType(64)), [index]))

    return _built(types.int64(types.int64, types.int64), build)


@intrinsic
def number(context: Any, address: Any) -> Any:
    """Return the float32 number at an address."""
    return _built(types.float32(types.int64), lambda b, address: b.load(_at(b, address, _FLOAT)))


@intrinsic
def put(context: Any, address: Any, value: Any) -> Any:
    """Write a float32 number to an address."""
    return _built(types.void(types.int64, types.float32), lambda b, at, value: b.store(value, _at(b, at, _FLOAT)))


@intrinsic
def load(context: Any, address: Any) -> Any:
    """Read float32 numbers."""
    return _built(VECTOR(types.int64), lambda b, address: b.load(_at(b, address, _FLOATS), align=4))


@intrinsic
def load_bf16(context: Any, address: Any) -> Any:
    """Read bf16 numbers."""

    def build(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        halves = b.load(_at(b, address, _HALVES), align=2)
        return b.bitcast(b.shl(b.zext(halves, _WORDS), _constant(16, _WORDS)), _FLOATS)

    return _built(VECTOR(types.int64), build)


@intrinsic
def store(context: Any, address: Any, vector: Any) -> Any:
    """Write float32 numbers."""
    built = lambda b, at, vector: b.store(vector, _at(b, at, _FLOATS), align=4)  # noqa: E731
    return _built(types.void(types.int64, VECTOR), built)


@intrinsic
def store_bf16(context: Any, address: Any, vector: Any) -> Any:
    """Write numbers, rounded to the nearest bf16, and to the even one of two."""

    def build(b: ir.IRBuilder, address: ir.Value, vector: ir.Value) -> ir.Value:
        bits, sixteen = b.bitcast(vector, _WORDS), _constant(16, _WORDS)
        odd = b.and_(b.lshr(bits, sixteen), _constant(1, _WORDS))
        rounded = b.lshr(b.add(bits, b.add(odd, _constant(0x7FFF, _WORDS))), sixteen)
        return b.store(b.trunc(rounded, _HALVES), _at(b, address, _HALVES), align=2)

    return _built(types.void(types.int64, VECTOR), build)


@intrinsic
def same(context: Any, value: Any) -> Any:
    """Return a vector of one number."""

    def build(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        first = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return b.shuffle_vector(first, first, _constant(0, _WORDS))

    return _built(VECTOR(types.float32), build)


@intrinsic
def add(context: Any, a: Any, b: Any) -> Any:
    return _built(VECTOR(*_TWO), lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def mul(context: Any, a: Any, b: Any) -> Any:
    return _built(VECTOR(*_TWO), lambda builder, a, b: builder.fmul(a, b))


@intrinsic
def divide(context: Any, a: Any, b: Any) -> Any:
    return _built(VECTOR(*_TWO), lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return _built(VECTOR(*_THREE), lambda builder, a, b, c: _call(builder, "fma", a, b, c))


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    return _built(VECTOR(*_TWO), lambda builder, a, b: _call(builder, "maxnum", a, b))


def _folded(builder: ir.IRBuilder, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Join the halves of a vector, then of its first half, and so on; returns the first number."""
    for half in (8, 4, 2, 1):
        order = [lane + half if lane < half else lane for lane in range(LANES)]
        vector = join(vector, builder.shuffle_vector(vector, vector, ir.Constant(_WORDS, order)))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@intrinsic
def total(context: Any, vector: Any) -> Any:
    return _built(types.float32(*_ONE), lambda b, vector: _folded(b, vector, b.fadd))


@intrinsic
def largest(context: Any, vector: Any) -> Any:
    return _built(types.float32(*_ONE), lambda b, v: _folded(b, v, lambda x, y: _call(b, "maxnum", x, y)))


@intrinsic
def within(context: Any, vector: Any, low: Any, high: Any, other: Any) -> Any:
    """Keep the numbers in lanes ``low`` to ``high`` - 1, and put ``other`` in the others."""

    def build(b: ir.IRBuilder, vector: ir.Value, low: ir.Value, high: ir.Value, other: ir.Value) -> ir.Value:
        lanes, zeros = ir.Constant(_WORDS, list(range(LANES))), _constant(0, _WORDS)

        def spread(value: ir.Value) -> ir.Value:
            first = b.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            return b.shuffle_vector(first, first, zeros)

        low, high = (spread(b.trunc(bound, ir.IntType(32))) for bound in (low, high))
        inside = b.and_(b.icmp_signed(">=", lanes, low), b.icmp_signed("<", lanes, high))
        return b.select(inside, vector, b.bitcast(spread(b.bitcast(other, ir.IntType(32))), _FLOATS))

    return _built(VECTOR(VECTOR, types.int64, types.int64, types.float32), build)


@intrinsic
def exp(context: Any, vector: Any) -> Any:
    """Return exponentials, within two units of the last place; of numbers below -87 that of -87."""

    def build(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        x = _call(b, "minnum", _call(b, "maxnum", x, _constant(_LOWEST)), _constant(_HIGHEST))
        whole = _call(b, "rint", b.fmul(x, _constant(_LOG2E)))
        rest = _call(b, "fma", whole, _constant(-_LN2_HIGH), x)
        rest = _call(b, "fma", whole, _constant(-_LN2_LOW), rest)
        result = _constant(_POLYNOMIAL[0])
        for factor in _POLYNOMIAL[1:]:
            result = _call(b, "fma", result, rest, _constant(factor))
        result = b.fadd(_call(b, "fma", result, b.fmul(rest, rest), rest), _constant(1.0))
        power = b.shl(b.add(b.fptosi(whole, _WORDS), _constant(127, _WORDS)), _constant(23, _WORDS))
        return b.fmul(result, b.bitcast(power, _FLOATS))

    return _built(VECTOR(*_ONE), build)


@intrinsic
def put_bf16(context: Any, address: Any, value: Any) -> Any:
    """Write a float32 number to an address, rounded to bf16 as by ``store_bf16``."""

    def build(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
        kind, half = ir.IntType(32), ir.IntType(16)
        bits = b.bitcast(value, kind)
        odd = b.and_(b.lshr(bits, kind(16)), kind(1))
        rounded = b.lshr(b.add(bits, b.add(odd, kind(0x7FFF))), kind(16))
        return b.store(b.trunc(rounded, half), _at(b, address, half))

    return _built(types.void(types.int64, types.float32), build)


@intrinsic
def move(context: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy one number of two or four bytes."""

    def build(b: ir.IRBuilder, target: ir.Value, source: ir.Value, size: ir.Value) -> ir.Value:
        with b.if_else(b.icmp_signed("==", size, size.type(4))) as branches:
            for branch, kind in zip(branches, (ir.IntType(32), ir.IntType(16)), strict=True):
                with branch:
                    b.store(b.load(_at(b, source, kind), align=2), _at(b, target, kind), align=2)
        return None

    return _built(types.void(types.int64, types.int64, types.int64), build)


@intrinsic
def integer(context: Any, address: Any) -> Any:
    """Return the uint32 number at an address, which may be any."""

    def build(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return b.zext(b.load(_at(b, address, ir.IntType(32)), align=1), ir.IntType(64))

    return _built(types.int64(types.int64), build)


@intrinsic
def value_of(context: Any, address: Any, kind: Any) -> Any:
    """Return the number at an address: of kind 1 float32, 2 bf16, 3 float16."""

    def build(b: ir.IRBuilder, address: ir.Value, kind: ir.Value) -> ir.Value:
        out = cgutils.alloca_once(b, _FLOAT)
        with b.if_else(b.icmp_signed("==", kind, kind.type(1))) as (is_wide, is_half):
            with is_wide:
                b.store(b.load(_at(b, address, _FLOAT), align=4), out)
            with is_half:
                bits = b.load(_at(b, address, ir.IntType(16)), align=2)
                high = b.bitcast(b.shl(b.zext(bits, ir.IntType(32)), ir.IntType(32)(16)), _FLOAT)
                half = b.fpext(b.bitcast(bits, ir.HalfType()), _FLOAT)
                b.store(b.select(b.icmp_signed("==", kind, kind.type(2)), high, half), out)
        return b.load(out)

    return _built(types.float32(types.int64, types.int64), build)
