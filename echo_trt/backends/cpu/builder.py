"""Write functions as LLVM IR: a builder with the few idioms that kernels need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, PTR = ir.HalfType(), ir.FloatType(), ir.PointerType()
vec = ir.VectorType


class _BFloat(ir.types.Type):
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


class Builder(ir.IRBuilder):
    """Write instructions of a function, with the few idioms that kernels need."""

    def at(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """Return ``pointer`` moved on by ``offset`` bytes."""
        return self.gep(pointer, [offset if isinstance(offset, ir.Value) else I64(offset)], source_etype=I8)

    def read(self, pointer: ir.Value, offset: ir.Value | int, kind: ir.Type, align: int = 1) -> ir.Value:
        """Load a value ``offset`` bytes after ``pointer``."""
        return self.load(self.at(pointer, offset), typ=kind, align=align)

    def vector(self, value: ir.Value, lanes: int) -> ir.Value:
        """Repeat a value ``lanes`` times."""
        kind = ir.VectorType(value.type, lanes)
        first = self.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(vec(I32, lanes), None))

    def intrinsic(self, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
        """Call one of LLVM's intrinsic functions."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [each.type for each in values]), name)
        return self.call(function, values)

    def matrix(self, name: str, *values: ir.Value | int) -> None:
        """Call an intrinsic function of AMX; an integer is a register's number."""
        given = [I8(each) if isinstance(each, int) else each for each in values]
        self.intrinsic(f"llvm.x86.{name}", ir.VoidType(), *given)

    def loop(
        self, count: ir.Value, state: Sequence[ir.Value], body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]]
    ) -> list[ir.Value]:
        """Repeat ``body``, which makes the next state of index and state, ``count`` times, at least once."""
        entry, head = self.block, self.append_basic_block()
        self.branch(head)
        self.position_at_end(head)
        index, values = self.phi(I64), [self.phi(each.type) for each in state]
        after = body(index, list(values))
        following = self.add(index, I64(1))
        for phi, before, then in zip((index, *values), (I64(0), *state), (following, *after), strict=True):
            phi.add_incoming(before, entry)
            phi.add_incoming(then, self.block)
        done = self.append_basic_block()
        self.cbranch(self.icmp_signed("<", following, count), head, done)
        self.position_at_end(done)
        return after

    def each(self, begin: ir.Value, end: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """Repeat ``body`` for each index, which may be none."""
        count = self.sub(end, begin)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            body(self.add(begin, index))
            return []

        with self.if_then(self.icmp_signed(">", count, I64(0))):
            self.loop(count, [], step)

    def claims(
        self, cell: ir.Value, total: ir.Value, threads: ir.Value, body: Callable[[ir.Value, ir.Value], None]
    ) -> None:
        """Repeat ``body`` for ranges of ``total`` things that no other thread has: long ones first, short ones last.

        A core that is slow, or that another process wants, takes fewer. ``cell`` is an int64 that was 0 before.
        """
        look, take, work, done = (self.append_basic_block() for _ in range(4))
        self.branch(look)
        self.position_at_end(look)
        begin = self.load_atomic(cell, "monotonic", 8, typ=I64)
        left = self.sub(total, begin)
        self.cbranch(self.icmp_signed(">", left, I64(0)), take, done)
        self.position_at_end(take)
        share = self.sdiv(left, self.mul(threads, I64(2)))
        end = self.add(begin, self.select(self.icmp_signed(">", share, I64(0)), share, I64(1)))
        taken = self.extract_value(self.cmpxchg(cell, begin, end, "monotonic"), 1)
        self.cbranch(taken, work, look)
        self.position_at_end(work)
        body(begin, end)
        self.branch(look)
        self.position_at_end(done)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the smaller of two integers."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def share(self, total: ir.Value, thread: ir.Value, threads: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return where a thread's share of ``total`` things begins and ends."""
        begin = self.sdiv(self.mul(total, thread), threads)
        return begin, self.sdiv(self.mul(total, self.add(thread, I64(1))), threads)


def const(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def start(module: ir.Module, name: str, kinds: Sequence[ir.Type], internal: bool = False) -> tuple[Builder, list]:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    function.linkage = "internal" if internal else ""
    return Builder(function.append_basic_block()), list(function.args)


class BlockOutput:
    """Store a block's sums in the columns that exist, plus what is added to them."""

    #: Types of what it takes: where the block's first row goes, bytes between rows, the same of what is added, which
    #: may be none, and how many columns there are from here on.
    KINDS = PTR, I64, PTR, I64, I64

    def __init__(self, b: Builder, lanes: int, out: ir.Value, stride: ir.Value, plus: ir.Value, *more: ir.Value):
        self._b, self._floats, self._name = b, vec(F32, lanes), f"v{lanes}f32.p0"
        self._out, self._stride, self._plus, (self._plus_stride, left) = out, stride, plus, more
        lane = ir.Constant(vec(I32, lanes), list(range(lanes)))
        self._mask = b.icmp_signed("<", lane, b.vector(b.trunc(b.smaller(left, I64(lanes)), I32), lanes))
        self._none = const(vec(ir.IntType(1), lanes), 0)
        self._bare = b.icmp_unsigned("==", plus, PTR(None))

    def store(self, row: ir.Value, total: ir.Value, rows: ir.Value | None = None) -> None:
        """Store the sums of a row, if it is one of ``rows``."""
        b, mask = self._b, self._mask
        if rows is not None:
            mask = b.select(b.icmp_signed("<", row, rows), mask, self._none)
        at = b.at(self._plus, b.mul(self._plus_stride, row))
        given = [at, I32(4), b.select(self._bare, self._none, mask), const(self._floats, 0.0)]
        added = b.intrinsic("llvm.masked.load." + self._name, self._floats, *given)
        total = b.select(self._bare, total, b.fadd(total, added))
        at = b.at(self._out, b.mul(self._stride, row))
        b.intrinsic("llvm.masked.store." + self._name, ir.VoidType(), total, at, I32(4), mask)
