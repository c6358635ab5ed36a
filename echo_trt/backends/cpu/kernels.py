"""Write the kernels of products as LLVM IR: ``quantise`` rounds rows to 8 bits, ``product`` multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from echo_trt.backends.cpu.formats import AHEAD, GROUP, SUPER, TINY, WeightFormat
from echo_trt.backends.cpu.machine_code import InstructionSet

#: Rows that share an unpacking of the weights; more spill registers.
TILE = 8
#: Values along K of one step of a loop over 16- or 32-bit weights.
UNROLLED = 8
#: What is subtracted from products of unsigned integers: offset x sum of the activations, kept per group in planes.
#: 6-bit weights have scales per 16 values, and two planes.
PLANES = {8: 0, 16: 1, 128: 2, 32: 3}
#: The plane of scale x sum in float32, for formats with minimums.
SUMS = 5

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, PTR = ir.HalfType(), ir.FloatType(), ir.PointerType()


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
        return self.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_vec(I32, lanes), None))

    def intrinsic(self, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
        """Call one of LLVM's intrinsic functions."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [each.type for each in values]), name)
        return self.call(function, values)

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


def _vec(kind: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def _const(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _begin(module: ir.Module, name: str, kinds: Sequence[ir.Type], internal: bool = False) -> tuple[Builder, list]:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    function.linkage = "internal" if internal else ""
    return Builder(function.append_basic_block()), list(function.args)


def quantise(module: ir.Module) -> None:
    """Write ``quantise``: float32 rows to 8 bits, shared among threads by rows and groups."""
    b, (record, thread, threads) = _begin(module, "quantise", [PTR, I64, I64])
    cell, x, values, factors, planes = (b.read(record, 8 * n, PTR) for n in range(5))
    stride, groups, plane = (b.read(record, 8 * n, I64) for n in range(5, 8))
    rows = b.read(cell, 0, I64)
    floats, ints = _vec(F32, GROUP), _vec(I32, GROUP)

    def group(index: ir.Value) -> None:
        row, g = b.sdiv(index, groups), b.srem(index, groups)
        tile = b.add(b.mul(b.sdiv(row, I64(TILE)), groups), g)
        slot = b.add(b.mul(tile, I64(TILE)), b.srem(row, I64(TILE)))
        read = b.read(x, b.add(b.mul(row, stride), b.mul(g, I64(4 * GROUP))), floats)
        bits = b.and_(b.bitcast(read, ints), _const(ints, 0x7FFFFFFF))  # ordered as the sizes are, and NaN above them
        largest = b.bitcast(b.intrinsic("llvm.vector.reduce.umax.v32i32", I32, bits), F32)
        some = b.not_(b.fcmp_ordered("<=", largest, F32(TINY)))
        inverse = b.select(some, b.fdiv(F32(127), largest), F32(0))
        factor = b.select(some, b.fdiv(largest, F32(127)), F32(0))
        nearest = b.intrinsic("llvm.rint.v32f32", floats, b.fmul(read, b.vector(inverse, GROUP)))
        integers = b.fptosi(nearest, ints)
        b.store(b.trunc(integers, _vec(I8, GROUP)), b.at(values, b.mul(slot, I64(GROUP))), align=1)
        at = b.mul(slot, I64(4))
        b.store(factor, b.at(factors, at))
        halves = []
        for half in (0, 16):
            mask = ir.Constant(_vec(I32, 16), list(range(half, half + 16)))
            part = b.shuffle_vector(integers, ir.Constant(ints, ir.Undefined), mask)
            halves.append(b.intrinsic("llvm.vector.reduce.add.v16i32", I32, part))
        whole = b.add(*halves)
        kept = [b.mul(whole, I32(-offset)) for offset in (8, 16, 128)] + [b.mul(half, I32(-32)) for half in halves]
        for n, value in enumerate((*kept, b.fmul(factor, b.sitofp(whole, F32)))):
            b.store(value, b.at(planes, b.add(b.mul(plane, I64(n)), at)))

    b.each(*b.share(b.mul(rows, groups), thread, threads), group)
    b.ret_void()


def product(module: ir.Module, shape: WeightFormat, using: InstructionSet) -> None:
    """Write ``product``: threads take ranges of column blocks, and go through them once per so many rows."""
    tiles = [_Tile(module, shape, using, rows).function for rows in range(1, TILE + 1)]
    # 32 registers hold the sums of two tiles, which then share an unpacking
    wide = _Tile(module, shape, using, 2 * TILE).function if using.lanes == 16 and not shape.kind else None
    b, (record, _, threads) = _begin(module, "product", [PTR, I64, I64])
    cell, quants, scales = (b.read(record, 8 * n, PTR) for n in range(3))
    blocks, steps, columns = (b.read(record, 8 * n, I64) for n in range(3, 6))
    x, factors, planes = (b.read(record, 8 * n, PTR) for n in range(6, 9))
    plane, out, stride = b.read(record, 72, I64), b.read(record, 80, PTR), b.read(record, 88, I64)
    plus, plus_stride, chunk = b.read(record, 96, PTR), b.read(record, 104, I64), b.read(record, 112, I64)
    rows = b.read(cell, 0, I64)
    row_tiles = b.sdiv(b.add(rows, I64(TILE - 1)), I64(TILE))
    groups = b.mul(steps, I64(shape.multiple // GROUP))
    quant_bytes = b.mul(groups, I64(shape.quant_bytes(using.lanes)))
    scale_bytes = b.mul(steps, I64(shape.scale_bytes(using.lanes)))

    def tile(index: ir.Value, block: ir.Value, pair: bool = False) -> None:
        row, column = b.mul(index, I64(TILE)), b.mul(block, I64(using.lanes))
        at = b.mul(column, I64(4))
        if shape.kind:
            inputs = [b.at(x, b.mul(row, plane)), factors, planes]
        else:
            groups_before = b.mul(index, groups)
            inputs = [
                b.at(each, b.mul(groups_before, I64(TILE * size)))
                for each, size in ((x, GROUP), (factors, 4), (planes, 4))
            ]
        added = b.select(b.icmp_unsigned("==", plus, PTR(None)), plus, b.at(plus, b.add(b.mul(row, plus_stride), at)))
        args = [
            b.at(quants, b.mul(block, quant_bytes)), b.at(scales, b.mul(block, scale_bytes)), steps, *inputs, plane,
            b.at(out, b.add(b.mul(row, stride), at)), stride, added, plus_stride, b.sub(columns, column),
        ]  # fmt: skip
        if pair:
            b.call(wide, args)
            return
        left = b.smaller(b.sub(rows, row), I64(TILE))
        after = b.append_basic_block()
        cases = [b.append_basic_block() for _ in tiles]
        switch = b.switch(left, cases[-1])
        for n, (case, function) in enumerate(zip(cases, tiles, strict=True)):
            if case is not cases[-1]:
                switch.add_case(I64(n + 1), case)
            b.position_at_end(case)
            b.call(function, args)
            b.branch(after)
        b.position_at_end(after)

    def rows_of(index: ir.Value, begin: ir.Value, end: ir.Value) -> None:
        first = b.mul(index, chunk)
        last = b.smaller(b.add(first, chunk), row_tiles)
        full = b.sdiv(b.sub(b.smaller(b.mul(last, I64(TILE)), rows), b.mul(first, I64(TILE))), I64(2 * TILE))
        single = b.add(first, b.mul(full, I64(2))) if wide else first

        def block_of(block: ir.Value) -> None:
            if wide:
                b.each(I64(0), full, lambda n: tile(b.add(first, b.mul(n, I64(2))), block, pair=True))
            b.each(single, last, lambda index: tile(index, block))

        b.each(begin, end, block_of)

    def columns_of(begin: ir.Value, end: ir.Value) -> None:
        b.each(I64(0), chunks, lambda index: rows_of(index, begin, end))

    chunks = b.sdiv(b.add(row_tiles, b.sub(chunk, I64(1))), chunk)
    b.claims(b.at(record, 120), blocks, threads, columns_of)
    b.ret_void()


class _Tile:
    """Write the product of ``rows`` rows by one block of columns."""

    def __init__(self, module: ir.Module, shape: WeightFormat, using: InstructionSet, rows: int) -> None:
        self.shape, self.using, self.rows, self.lanes = shape, using, rows, using.lanes
        kinds = [PTR, PTR, I64, PTR, PTR, PTR, I64, PTR, I64, PTR, I64, I64]
        self.b, args = _begin(module, f"tile{rows}", kinds, internal=True)
        self.function = self.b.function
        self.floats, self.ints = _vec(F32, self.lanes), _vec(I32, self.lanes)
        self.bytes, self.words = _vec(I8, 4 * self.lanes), _vec(I16, 2 * self.lanes)
        self.quants, self.scales, steps, self.x, self.factors, self.planes, self.plane, *outputs = args
        self.next_tile = self.b.mul(steps, I64(shape.multiple // GROUP * TILE))  # rows of groups until the next tile
        step = self._floats if shape.kind else self._groups
        self._store(self.b.loop(steps, [_const(self.floats, 0.0)] * rows, step), *outputs)
        self.b.ret_void()

    def _fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.intrinsic(f"llvm.fma.v{self.lanes}f32", self.floats, a, b, c)

    def _store(self, sums: list[ir.Value], out, stride, plus, plus_stride, left) -> None:
        """Add ``plus`` where there is something, and store the columns that exist."""
        b, name = self.b, f"v{self.lanes}f32.p0"
        lane = ir.Constant(self.ints, list(range(self.lanes)))
        mask = b.icmp_signed("<", lane, b.vector(b.trunc(b.smaller(left, I64(self.lanes)), I32), self.lanes))
        bare, zero = b.icmp_unsigned("==", plus, PTR(None)), _const(self.floats, 0.0)
        mask_plus = b.select(bare, _const(_vec(ir.IntType(1), self.lanes), 0), mask)
        for row, total in enumerate(sums):
            at = b.at(plus, b.mul(plus_stride, I64(row)))
            added = b.intrinsic("llvm.masked.load." + name, self.floats, at, I32(4), mask_plus, zero)
            total = b.select(bare, total, b.fadd(total, added))
            at = b.at(out, b.mul(stride, I64(row)))
            b.intrinsic("llvm.masked.store." + name, ir.VoidType(), total, at, I32(4), mask)

    def _floats(self, step: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of 32 values along K, one after the other."""
        size = self.shape.bits // 8 * self.lanes

        def part(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            b = self.b
            k = b.add(b.mul(step, I64(GROUP)), b.mul(index, I64(UNROLLED)))
            weights, x = b.at(self.quants, b.mul(k, I64(size))), b.at(self.x, b.mul(k, I64(4)))
            for ahead in range(0, UNROLLED * size, 64):
                self._prefetch(weights, ahead)
            rows = [b.at(x, b.mul(self.plane, I64(row))) for row in range(self.rows)]
            for n in range(UNROLLED):
                values = self._widened(weights, n * size)
                sums = [
                    self._fma(b.vector(b.read(row, 4 * n, F32), self.lanes), values, total)
                    for row, total in zip(rows, sums, strict=True)
                ]
            return sums

        return self.b.loop(I64(GROUP // UNROLLED), sums, part)

    def _widened(self, pointer: ir.Value, offset: int) -> ir.Value:
        """Read a vector of weights as float32."""
        b, kind = self.b, self.shape.kind
        if kind == "f32":
            return b.read(pointer, offset, self.floats)
        if kind == "f16":
            return b.fpext(b.read(pointer, offset, _vec(F16, self.lanes)), self.floats)
        wide = b.zext(b.read(pointer, offset, _vec(I16, self.lanes)), self.ints)
        return b.bitcast(b.shl(wide, _const(self.ints, 16)), self.floats)

    def _prefetch(self, pointer: ir.Value, offset: int) -> None:
        self.b.intrinsic("llvm.prefetch.p0", ir.VoidType(), self.b.at(pointer, AHEAD + offset), I32(0), I32(3), I32(1))

    def _groups(self, step: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of a group, or of the groups that share their factors."""
        b, shape, lanes = self.b, self.shape, self.lanes
        scales = b.at(self.scales, b.mul(step, I64(shape.scale_bytes(lanes))))
        factors = [
            b.fpext(b.read(scales, 2 * lanes * n, _vec(F16, lanes)), self.floats) for n in range(1 + shape.minimum)
        ]
        if not shape.integers:
            return self._group(step, factors[:1], factors[1:], sums)
        count = shape.integers + shape.minimum

        def group(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            own = b.at(scales, b.add(I64(2 * lanes * len(factors)), b.mul(index, I64(count * lanes))))
            read = [b.read(own, lanes * n, _vec(I8, lanes)) for n in range(count)]
            widen = b.sext if shape.integers == 2 else b.zext
            read = [b.sitofp(widen(each, self.ints), self.floats) for each in read]
            applied = [b.fmul(factors[0], each) for each in read[: shape.integers]]
            minimums = [b.fmul(factors[1], each) for each in read[shape.integers :]]
            return self._group(b.add(b.mul(step, I64(SUPER)), index), applied, minimums, sums)

        return b.loop(I64(SUPER), sums, group)

    def _group(
        self, index: ir.Value, scales: list[ir.Value], minimums: list[ir.Value], sums: list[ir.Value]
    ) -> list[ir.Value]:
        """Add the products of one group; the integers of a row are exact, then come its scale and minimum."""
        b = self.b
        quants = b.at(self.quants, b.mul(index, I64(self.shape.quant_bytes(self.lanes))))
        for ahead in range(0, self.shape.quant_bytes(self.lanes), 64):
            self._prefetch(quants, ahead)
        weights = self._unpack(quants)
        slots = [b.mul(index, I64(TILE))]
        slots.append(b.add(slots[0], self.next_tile))
        negated = [b.fneg(each) for each in minimums]
        result = []
        for row, total in enumerate(sums):
            slot = b.add(slots[row // TILE], I64(row % TILE))
            at = b.mul(slot, I64(4))
            values = b.at(self.x, b.mul(slot, I64(GROUP)))
            factor = b.vector(b.read(self.factors, at, F32), self.lanes)
            x = [b.read(values, 4 * quad, I32) for quad in range(8)]
            part = 8 // len(scales)
            for n, scale in enumerate(scales):
                plane = b.at(self.planes, b.mul(self.plane, I64(n)))
                start = None if minimums else b.vector(b.read(plane, at, I32), self.lanes)
                quads = slice(n * part, (n + 1) * part)
                integer = self._dot(weights[quads], x[quads], start)
                total = self._fma(b.sitofp(integer, self.floats), b.fmul(scale, factor), total)
            for minimum in negated:
                total = self._fma(minimum, b.vector(b.read(self.planes, at, F32), self.lanes), total)
            result.append(total)
        return result

    def _unpack(self, quants: ir.Value) -> list[ir.Value]:
        """Return a group's eight vectors of unsigned integers; vector i has values 4i to 4i + 3 of each column."""
        b, bits, size = self.b, self.shape.bits, 4 * self.lanes
        read = [b.read(quants, n * size, self.words) for n in range(bits)]
        if bits == 8:
            return [b.bitcast(each, self.bytes) for each in read]
        low = _const(self.words, 0x0F0F)
        weights = [b.and_(b.lshr(each, _const(self.words, s)), low) for each in read[:4] for s in (0, 4)]
        step = bits - 4
        for i in range(8 if step else 0):
            above, shift = read[4 + i * step // 8], 4 - i * step % 8  # to bit 4 of each byte
            moved = b.shl(above, _const(self.words, shift)) if shift > 0 else b.lshr(above, _const(self.words, -shift))
            weights[i] = b.or_(weights[i], b.and_(moved, _const(self.words, 0x1010 if step == 1 else 0x3030)))
        return [b.bitcast(each, self.bytes) for each in weights]

    def _dot(self, weights: list[ir.Value], x: list[ir.Value], start: ir.Value | None) -> ir.Value:
        """Add the products of unsigned weights and signed activations, four to a column, to ``start``."""
        b, using = self.b, self.using
        x = [b.bitcast(b.vector(each, self.lanes), self.bytes) for each in x]
        if self.shape.bits == 8 and (using.signed or not using.dot):  # with a sign there is nothing to subtract
            weights, start = [b.xor(each, _const(self.bytes, -128)) for each in weights], None
        zero = _const(self.ints, 0)
        if not using.dot:
            return self._dot_of_pairs(weights, x, zero if start is None else start)
        totals, kind = [zero if start is None else start, zero], self.bytes if using.signed else self.ints
        for n, (weight, value) in enumerate(zip(weights, x, strict=True)):
            operands = b.bitcast(weight, kind), b.bitcast(value, kind)
            totals[n % 2] = b.intrinsic(using.dot, self.ints, totals[n % 2], *operands)
        return b.add(*totals)

    def _dot_of_pairs(self, weights: list[ir.Value], x: list[ir.Value], total: ir.Value) -> ir.Value:
        """Do the same by sums of two products in 16 bits, which hold: 254 x the largest weight, so many times."""
        b, bits = self.b, self.shape.bits
        if bits == 8:  # too large without a sign, which goes to the activation
            moved = zip(x, weights, strict=True)
            x = [b.intrinsic("llvm.x86.avx2.psign.b", self.bytes, value, sign) for value, sign in moved]
            weights = [b.intrinsic("llvm.abs.v32i8", self.bytes, each, ir.IntType(1)(0)) for each in weights]
        pairs = [
            b.intrinsic("llvm.x86.avx2.pmadd.ub.sw", self.words, weight, value)
            for weight, value in zip(weights, x, strict=True)
        ]
        fit = 1 if bits == 8 else 32767 // (254 * (2**bits - 1))
        for n in range(0, len(pairs), fit):
            pair = pairs[n]
            for each in pairs[n + 1 : n + fit]:
                pair = b.add(pair, each)
            quad = b.intrinsic("llvm.x86.avx2.pmadd.wd", self.ints, pair, _const(self.words, 1))
            total = b.add(total, quad)
        return total
