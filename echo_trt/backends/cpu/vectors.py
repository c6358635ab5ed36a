"""Vectors of sixteen float32 numbers in numba's functions, read from addresses and written to them.

A sum has the order that is written here, on any CPU. A compiler may not reorder sums of numbers, and so would not make
vectors of them by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

LANES = 16
_FLOAT, _HALF, _INT, _LONG = ir.FloatType(), *(ir.IntType(bits) for bits in (16, 32, 64))
_FLOATS, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _HALF))
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


def operation(returned: types.Type, *taken: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of a function that builds LLVM's instructions from a builder and arguments of these types."""

    def make(build: Callable[..., Any]) -> Any:
        def typed(context: Any, *given: Any) -> Any:
            return returned(*taken), lambda context, builder, signature, values: build(builder, *values)

        typed.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # numba counts its parameters
        typed.__name__, typed.__doc__ = build.__name__, build.__doc__
        return intrinsic(typed)

    return make


def _constant(value: Any, kind: ir.VectorType = _FLOATS) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _call(b: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), values)


def _at(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.inttoptr(address, kind.as_pointer())


def spread(b: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """Return a vector of one value."""
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return b.shuffle_vector(first, first, _constant(0, _WORDS))


def _folded(b: ir.IRBuilder, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Join the halves of a vector, then of its first half, and so on; returns the first number."""
    for half in (8, 4, 2, 1):
        order = [lane + half if lane < half else lane for lane in range(LANES)]
        vector = join(vector, b.shuffle_vector(vector, vector, ir.Constant(_WORDS, order)))
    return b.extract_element(vector, _INT(0))


def _to_bf16(b: ir.IRBuilder, bits: ir.Value, constant: Callable[[int], ir.Value]) -> ir.Value:
    """Round the bits of float32 numbers to the nearest bf16, and to the even one of two; it is in the lower half."""
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    return b.lshr(b.add(bits, b.add(odd, constant(0x7FFF))), constant(16))


@operation(types.int64, types.int64, types.int64)
def word(b: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    """Return the int64 number ``index`` behind an address."""
    return b.load(b.gep(_at(b, address, _LONG), [index]))


@operation(types.void, types.int64, types.int64)
def put_word(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Write an int64 number to an address."""
    return b.store(value, _at(b, address, _LONG))


@operation(types.void, types.int64, types.int64, types.int64, types.int64)
def call(b: ir.IRBuilder, function: ir.Value, record: ir.Value, thread: ir.Value, threads: ir.Value) -> None:
    """Call the function of an op that stands at an address."""
    b.call(_at(b, function, ir.FunctionType(ir.VoidType(), [_LONG] * 3)), [record, thread, threads])


@operation(types.int64, types.int64)
def integer(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Return the uint32 number at an address, which may be any."""
    return b.zext(b.load(_at(b, address, _INT), align=1), _LONG)


@operation(types.float32, types.int64)
def number(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Return the float32 number at an address."""
    return b.load(_at(b, address, _FLOAT))


@operation(types.float32, types.int64, types.int64)
def value_of(b: ir.IRBuilder, address: ir.Value, kind: ir.Value) -> ir.Value:
    """Return the number at an address: of kind 1 float32, 2 bf16, 3 float16."""
    out = cgutils.alloca_once(b, _FLOAT)
    with b.if_else(b.icmp_signed("==", kind, _LONG(1))) as (is_wide, is_half):
        with is_wide:
            b.store(b.load(_at(b, address, _FLOAT), align=4), out)
        with is_half:
            bits = b.load(_at(b, address, _HALF), align=2)
            high = b.bitcast(b.shl(b.zext(bits, _INT), _INT(16)), _FLOAT)
            half = b.fpext(b.bitcast(bits, ir.HalfType()), _FLOAT)
            b.store(b.select(b.icmp_signed("==", kind, _LONG(2)), high, half), out)
    return b.load(out)


@operation(types.void, types.int64, types.float32)
def put(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Write a float32 number to an address."""
    return b.store(value, _at(b, address, _FLOAT))


@operation(types.void, types.int64, types.float32)
def put_bf16(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Write a float32 number to an address as bf16."""
    rounded = _to_bf16(b, b.bitcast(value, _INT), _INT)
    return b.store(b.trunc(rounded, _HALF), _at(b, address, _HALF))


@operation(types.void, types.int64, types.int64, types.int64)
def move(b: ir.IRBuilder, target: ir.Value, source: ir.Value, size: ir.Value) -> None:
    """Copy one number of two or four bytes."""
    with b.if_else(b.icmp_signed("==", size, _LONG(4))) as branches:
        for branch, kind in zip(branches, (_INT, _HALF), strict=True):
            with branch:
                b.store(b.load(_at(b, source, kind), align=2), _at(b, target, kind), align=2)


@operation(VECTOR, types.int64)
def load(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Read float32 numbers."""
    return b.load(_at(b, address, _FLOATS), align=4)


@operation(VECTOR, types.int64)
def load_bf16(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Read bf16 numbers."""
    halves = b.load(_at(b, address, _HALVES), align=2)
    return b.bitcast(b.shl(b.zext(halves, _WORDS), _constant(16, _WORDS)), _FLOATS)


@operation(types.void, types.int64)
def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Ask the memory for the cache line of an address, which may be any."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [_at(b, address, ir.IntType(8)), _INT(0), _INT(3), _INT(1)])


@operation(types.void, types.int64, VECTOR)
def store(b: ir.IRBuilder, address: ir.Value, vector: ir.Value) -> ir.Value:
    """Write float32 numbers."""
    return b.store(vector, _at(b, address, _FLOATS), align=4)


@operation(types.void, types.int64, VECTOR)
def store_bf16(b: ir.IRBuilder, address: ir.Value, vector: ir.Value) -> ir.Value:
    """Write numbers as bf16."""
    rounded = _to_bf16(b, b.bitcast(vector, _WORDS), lambda value: _constant(value, _WORDS))
    return b.store(b.trunc(rounded, _HALVES), _at(b, address, _HALVES), align=2)


@operation(VECTOR, types.float32)
def same(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return a vector of one number."""
    return spread(b, value, _FLOATS)


@operation(VECTOR, VECTOR, VECTOR)
def add(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fadd(x, y)


@operation(VECTOR, VECTOR, VECTOR)
def mul(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fmul(x, y)


@operation(VECTOR, VECTOR, VECTOR)
def divide(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fdiv(x, y)


@operation(VECTOR, VECTOR, VECTOR, VECTOR)
def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """Return x * y + z, rounded once."""
    return _call(b, "fma", x, y, z)


@operation(VECTOR, VECTOR, VECTOR)
def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return _call(b, "maxnum", x, y)


@operation(types.float32, VECTOR)
def leading(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return b.extract_element(vector, _INT(0))


@operation(types.float32, VECTOR)
def total(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return _folded(b, vector, b.fadd)


@operation(types.float32, VECTOR)
def largest(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return _folded(b, vector, lambda x, y: _call(b, "maxnum", x, y))


@operation(VECTOR, VECTOR, types.int64, types.int64, types.float32)
def within(b: ir.IRBuilder, vector: ir.Value, low: ir.Value, high: ir.Value, other: ir.Value) -> ir.Value:
    """Keep the numbers in lanes ``low`` to ``high`` - 1, and put ``other`` in the others."""
    lanes = ir.Constant(_WORDS, list(range(LANES)))
    low, high = (spread(b, b.trunc(bound, _INT), _WORDS) for bound in (low, high))
    inside = b.and_(b.icmp_signed(">=", lanes, low), b.icmp_signed("<", lanes, high))
    return b.select(inside, vector, spread(b, other, _FLOATS))


@operation(VECTOR, VECTOR)
def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return exponentials, within two units of the last place; of numbers below -87 that of -87."""
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
