"""Write the kernels of products as LLVM IR: ``quantise`` rounds rows to 8 bits, ``product`` multiplies them."""

from __future__ import annotations

from llvmlite import ir

from echo_trt.backends.cpu import tiles
from echo_trt.backends.cpu.builder import BF16, F16, F32, I8, I16, I32, I64, PTR, BlockOutput, const, start, vec
from echo_trt.backends.cpu.formats import AHEAD, GROUP, SUPER, TINY, WeightFormat
from echo_trt.backends.cpu.machine_code import InstructionSet
from echo_trt.backends.cpu.tiles import ROUNDED, TILE

#: Values along K of one step of a loop over 16- or 32-bit weights.
UNROLLED = 8
#: Rows from which on AMX multiplies integers. Fewer: unpacking, during which nothing is multiplied, takes too much.
MANY = 33
#: What is subtracted from products of unsigned integers: offset x sum of the activations, kept per group in planes.
#: 6-bit weights have scales per 16 values, and two planes.
PLANES = {8: 0, 16: 1, 128: 2, 32: 3}
#: The plane of scale x sum in float32, for formats with minimums.
SUMS = 5


def quantise(module: ir.Module) -> None:
    """Write ``quantise``: float32 rows to 8 bits, shared among threads by rows and groups."""
    b, (record, thread, threads) = start(module, "quantise", [PTR, I64, I64])
    cell, x, values, factors, planes = (b.read(record, 8 * n, PTR) for n in range(5))
    stride, groups, plane = (b.read(record, 8 * n, I64) for n in range(5, 8))
    rows = b.read(cell, 0, I64)
    floats, ints = vec(F32, GROUP), vec(I32, GROUP)

    def group(index: ir.Value) -> None:
        row, g = b.sdiv(index, groups), b.srem(index, groups)
        tile = b.add(b.mul(b.sdiv(row, I64(ROUNDED)), groups), g)
        slot = b.add(b.mul(tile, I64(ROUNDED)), b.srem(row, I64(ROUNDED)))
        read = b.read(x, b.add(b.mul(row, stride), b.mul(g, I64(4 * GROUP))), floats)
        bits = b.and_(b.bitcast(read, ints), const(ints, 0x7FFFFFFF))  # ordered as the sizes are, and NaN above them
        largest = b.bitcast(b.intrinsic("llvm.vector.reduce.umax.v32i32", I32, bits), F32)
        some = b.not_(b.fcmp_ordered("<=", largest, F32(TINY)))
        inverse = b.select(some, b.fdiv(F32(127), largest), F32(0))
        factor = b.select(some, b.fdiv(largest, F32(127)), F32(0))
        nearest = b.intrinsic("llvm.rint.v32f32", floats, b.fmul(read, b.vector(inverse, GROUP)))
        integers = b.fptosi(nearest, ints)
        b.store(b.trunc(integers, vec(I8, GROUP)), b.at(values, b.mul(slot, I64(GROUP))), align=1)
        at = b.mul(slot, I64(4))
        b.store(factor, b.at(factors, at))
        halves = []
        for half in (0, 16):
            mask = ir.Constant(vec(I32, 16), list(range(half, half + 16)))
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
    if shape.kind == "bf16" and using.bf16 == "tiles":
        tiles.product_of_bf16(module)
        return
    small = [_Tile(module, shape, using, rows).function for rows in range(1, TILE + 1)]
    # two scales of a group would double what AMX stores, and take longer than without it
    tiled = using.bf16 == "tiles" and not shape.kind and shape.integers < 2
    # 32 registers hold the sums of two tiles, which then share an unpacking
    wide = _Tile(module, shape, using, 2 * TILE).function if using.lanes == 16 else None
    if tiled:
        unpack, by_amx = _Unpacked(module, shape, using, 0).function, tiles.product_of_unpacked(module, shape)
    b, (record, _, threads) = start(module, "product", [PTR, I64, I64])
    of = tiles.Record(b, record)
    groups = b.mul(of.steps, I64(shape.multiple // GROUP))
    quant_bytes = b.mul(groups, I64(shape.quant_bytes(using.lanes)))
    scale_bytes = b.mul(of.steps, I64(shape.scale_bytes(using.lanes)))
    if tiled:
        unpacked = b.alloca(I8, b.mul(groups, I64(tiles.unpacked_bytes(shape))))
        unpacked.align = 64
        many = b.icmp_signed(">=", of.rows, I64(MANY))
        with b.if_then(many):
            tiles.configure(b, ROUNDED, GROUP)

    def tile(index: ir.Value, block: ir.Value, pair: ir.Function | None = None) -> None:
        row, column = b.mul(index, I64(TILE)), b.mul(block, I64(using.lanes))
        if shape.kind:
            inputs = [b.at(of.x, b.mul(row, of.plane)), of.factors, of.planes]
        else:
            groups_before = b.mul(b.sdiv(row, I64(ROUNDED)), groups)
            slot = b.add(b.mul(groups_before, I64(ROUNDED)), b.srem(row, I64(ROUNDED)))
            inputs = [
                b.at(each, b.mul(slot, I64(size))) for each, size in ((of.x, GROUP), (of.factors, 4), (of.planes, 4))
            ]
        weights = [b.at(of.quants, b.mul(block, quant_bytes)), b.at(of.scales, b.mul(block, scale_bytes))]
        rest = [of.steps, *inputs, of.plane, *of.output(row, column)]
        if pair:
            by_tiles = [unpacked, groups, *rest[1:], b.sub(of.rows, row)] if pair is not wide else []
            b.call(pair, by_tiles or [*weights, *rest])
            return
        left = b.smaller(b.sub(of.rows, row), I64(TILE))
        after = b.append_basic_block()
        cases = [b.append_basic_block() for _ in small]
        switch = b.switch(left, cases[-1])
        for n, (case, function) in enumerate(zip(cases, small, strict=True)):
            if case is not cases[-1]:
                switch.add_case(I64(n + 1), case)
            b.position_at_end(case)
            b.call(function, [*weights, *rest])
            b.branch(after)
        b.position_at_end(after)

    def body(first: ir.Value, last: ir.Value, begin: ir.Value, end: ir.Value) -> None:
        count = b.sub(b.smaller(b.mul(last, I64(TILE)), of.rows), b.mul(first, I64(TILE)))
        more = b.select(many, I64(TILE - 1), I64(0)) if tiled else I64(0)  # a half-filled pair, too, by AMX
        full = b.sdiv(b.add(count, more), I64(2 * TILE))
        single = b.add(first, b.mul(full, I64(2))) if wide else first

        def pairs(block: ir.Value, function: ir.Function) -> None:
            b.each(I64(0), full, lambda n: tile(b.add(first, b.mul(n, I64(2))), block, function))

        def block_of(block: ir.Value) -> None:
            if tiled:
                with b.if_else(many) as (by_tiles, by_vectors):
                    with by_tiles:
                        at = b.at(of.quants, b.mul(block, quant_bytes)), b.at(of.scales, b.mul(block, scale_bytes))
                        none = PTR(None)
                        b.call(unpack, [*at, of.steps, unpacked, none, none, of.plane, *[none, I64(0)] * 2, I64(0)])
                        pairs(block, by_amx)
                    with by_vectors:
                        pairs(block, wide)
            elif wide:
                pairs(block, wide)
            b.each(single, last, lambda index: tile(index, block))

        b.each(begin, end, block_of)

    of.walk(threads, body)
    if tiled:
        with b.if_then(many):
            b.matrix("tilerelease")
    b.ret_void()


class _Tile:
    """Write the product of ``rows`` rows by one block of columns."""

    name = "tile"

    def __init__(self, module: ir.Module, shape: WeightFormat, using: InstructionSet, rows: int) -> None:
        self.shape, self.using, self.rows, self.lanes = shape, using, rows, using.lanes
        kinds = [PTR, PTR, I64, PTR, PTR, PTR, I64, *BlockOutput.KINDS]
        self.b, args = start(module, f"{self.name}{rows}", kinds, internal=True)
        self.function = self.b.function
        self.floats, self.ints = vec(F32, self.lanes), vec(I32, self.lanes)
        self.bytes, self.words = vec(I8, 4 * self.lanes), vec(I16, 2 * self.lanes)
        self.quants, self.scales, steps, self.x, self.factors, self.planes, self.plane, *output = args
        step = self._floats if shape.kind else self._groups
        totals = self.b.loop(steps, [const(self.floats, 0.0)] * rows, step)
        to = BlockOutput(self.b, self.lanes, *output)
        for row, total in enumerate(totals):
            to.store(I64(row), total)
        self.b.ret_void()

    def _fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.intrinsic(f"llvm.fma.v{self.lanes}f32", self.floats, a, b, c)

    def _floats(self, step: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of 32 values along K, one after the other."""
        size, pairs = self.shape.bits // 8 * self.lanes, self.using.bf16 == "pairs" and self.shape.kind == "bf16"

        def part(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            b = self.b
            k = b.add(b.mul(step, I64(GROUP)), b.mul(index, I64(UNROLLED)))
            weights, x = b.at(self.quants, b.mul(k, I64(size))), b.at(self.x, b.mul(k, I64(2 if pairs else 4)))
            for ahead in range(0, UNROLLED * size, 64):
                self._prefetch(weights, ahead)
            rows = [b.at(x, b.mul(self.plane, I64(row))) for row in range(self.rows)]
            for n in range(0, UNROLLED, 2 if pairs else 1):
                if pairs:
                    read = b.read(weights, n * size, self.ints)
                    sums = [
                        self._dot_of_bf16(b.vector(b.read(row, 2 * n, I32), self.lanes), read, total)
                        for row, total in zip(rows, sums, strict=True)
                    ]
                    continue
                values = self._widened(weights, n)
                sums = [
                    self._fma(b.vector(b.read(row, 4 * n, F32), self.lanes), values, total)
                    for row, total in zip(rows, sums, strict=True)
                ]
            return sums

        return self.b.loop(I64(GROUP // UNROLLED), sums, part)

    def _dot_of_bf16(self, x: ir.Value, weights: ir.Value, total: ir.Value) -> ir.Value:
        """Add the products of the second numbers of pairs, then of the first ones."""
        pair = [self.b.bitcast(each, vec(BF16, 2 * self.lanes)) for each in (x, weights)]
        return self.b.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", self.floats, total, *pair)

    def _widened(self, pointer: ir.Value, k: int) -> ir.Value:
        """Read a vector of weights as float32."""
        b, kind, size = self.b, self.shape.kind, self.shape.bits // 8 * self.lanes
        if kind == "f32":
            return b.read(pointer, k * size, self.floats)
        if kind == "f16":
            return b.fpext(b.read(pointer, k * size, vec(F16, self.lanes)), self.floats)
        pair = b.read(pointer, k // 2 * 2 * size, self.ints)
        high = b.and_(pair, const(self.ints, -65536)) if k % 2 else b.shl(pair, const(self.ints, 16))
        return b.bitcast(high, self.floats)

    def _prefetch(self, pointer: ir.Value, offset: int) -> None:
        self.b.intrinsic("llvm.prefetch.p0", ir.VoidType(), self.b.at(pointer, AHEAD + offset), I32(0), I32(3), I32(1))

    def _groups(self, step: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of a group, or of the groups that share their factors."""
        b, shape, lanes = self.b, self.shape, self.lanes
        scales = b.at(self.scales, b.mul(step, I64(shape.scale_bytes(lanes))))
        factors = [
            b.fpext(b.read(scales, 2 * lanes * n, vec(F16, lanes)), self.floats) for n in range(1 + shape.minimum)
        ]
        if not shape.integers:
            return self._group(step, factors[:1], factors[1:], sums)
        count = shape.integers + shape.minimum

        def group(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            own = b.at(scales, b.add(I64(2 * lanes * len(factors)), b.mul(index, I64(count * lanes))))
            read = [b.read(own, lanes * n, vec(I8, lanes)) for n in range(count)]
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
        negated = [b.fneg(each) for each in minimums]
        result = []
        for row, total in enumerate(sums):
            slot = b.add(b.mul(index, I64(ROUNDED)), I64(row))
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
        low = const(self.words, 0x0F0F)
        weights = [b.and_(b.lshr(each, const(self.words, s)), low) for each in read[:4] for s in (0, 4)]
        step = bits - 4
        for i in range(8 if step else 0):
            above, shift = read[4 + i * step // 8], 4 - i * step % 8  # to bit 4 of each byte
            moved = b.shl(above, const(self.words, shift)) if shift > 0 else b.lshr(above, const(self.words, -shift))
            weights[i] = b.or_(weights[i], b.and_(moved, const(self.words, 0x1010 if step == 1 else 0x3030)))
        return [b.bitcast(each, self.bytes) for each in weights]

    def _dot(self, weights: list[ir.Value], x: list[ir.Value], start: ir.Value | None) -> ir.Value:
        """Add the products of unsigned weights and signed activations, four to a column, to ``start``."""
        b, using = self.b, self.using
        x = [b.bitcast(b.vector(each, self.lanes), self.bytes) for each in x]
        if self.shape.bits == 8 and (using.signed or not using.dot):  # with a sign there is nothing to subtract
            weights, start = [b.xor(each, const(self.bytes, -128)) for each in weights], None
        zero = const(self.ints, 0)
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
            quad = b.intrinsic("llvm.x86.avx2.pmadd.wd", self.ints, pair, const(self.words, 1))
            total = b.add(total, quad)
        return total


class _Unpacked(_Tile):
    """Write a function that leaves a block's weights as ``tiles`` multiplies them, where activations would be."""

    name = "unpack"

    def _group(
        self, index: ir.Value, scales: list[ir.Value], minimums: list[ir.Value], sums: list[ir.Value]
    ) -> list[ir.Value]:
        b, size = self.b, 4 * self.lanes
        quants = b.at(self.quants, b.mul(index, I64(self.shape.quant_bytes(self.lanes))))
        for ahead in range(0, self.shape.quant_bytes(self.lanes), 64):
            self._prefetch(quants, ahead)
        left = [*self._unpack(quants), *scales, *(b.fneg(each) for each in minimums)]
        at = b.at(self.x, b.mul(index, I64(tiles.unpacked_bytes(self.shape))))
        for n, each in enumerate(left):
            b.store(each, b.at(at, n * size), align=64)
        return sums
