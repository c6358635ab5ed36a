"""Write products by AMX, whose registers are matrices of 16 rows: of bf16, and of integers of many rows.

A sum has the order of the other kernels where integers are multiplied, since those are exact. bf16 is summed in an
order of its own, which no row's company changes.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from echo_trt.backends.cpu.builder import F32, I8, I32, I64, PTR, BlockOutput, Builder, const, start, vec
from echo_trt.backends.cpu.formats import AHEAD, GROUP, WeightFormat

#: Rows that share an unpacking of the weights; more spill registers.
TILE = 8
LANES = 16
#: Rows of activations in 8 bits whose groups stand beside each other.
ROUNDED = 16
#: Groups whose integers are kept, all but one computed in advance, since a CPU waits for what a matrix register has
#: stored. With 8, reads would stand 4 KB behind writes, which a CPU takes for the same address.
RING = 4
#: Registers: sums, then activations, then weights.
SUMS, ROWS, WEIGHTS = 0, 4, 6


class Record:
    """Read what a ``product`` is asked for."""

    def __init__(self, b: Builder, record: ir.Value) -> None:
        self._b, self._record = b, record
        cell, self.quants, self.scales = (b.read(record, 8 * n, PTR) for n in range(3))
        self.blocks, self.steps, self.columns = (b.read(record, 8 * n, I64) for n in range(3, 6))
        self.x, self.factors, self.planes = (b.read(record, 8 * n, PTR) for n in range(6, 9))
        self.plane, self._out, self._stride = b.read(record, 72, I64), b.read(record, 80, PTR), b.read(record, 88, I64)
        self._plus, self._plus_stride = b.read(record, 96, PTR), b.read(record, 104, I64)
        self.chunk, self.rows = b.read(record, 112, I64), b.read(cell, 0, I64)

    def output(self, row: ir.Value, column: ir.Value) -> list[ir.Value]:
        """Return what ``BlockOutput`` takes for sums from this row and column on."""
        b, plus = self._b, self._plus
        at = b.mul(column, I64(4))
        added = b.at(plus, b.add(b.mul(row, self._plus_stride), at))
        out, added = b.at(self._out, b.add(b.mul(row, self._stride), at)), b.select(self._bare(), plus, added)
        return [out, self._stride, added, self._plus_stride, b.sub(self.columns, column)]

    def _bare(self) -> ir.Value:
        return self._b.icmp_unsigned("==", self._plus, PTR(None))

    def walk(self, threads: ir.Value, body: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]) -> None:
        """Take ranges of blocks, and repeat ``body`` for first and last row tile, and first and last block."""
        b = self._b
        row_tiles = b.sdiv(b.add(self.rows, I64(TILE - 1)), I64(TILE))
        chunks = b.sdiv(b.add(row_tiles, b.sub(self.chunk, I64(1))), self.chunk)

        def blocks_of(begin: ir.Value, end: ir.Value) -> None:
            def chunk_of(index: ir.Value) -> None:
                first = b.mul(index, self.chunk)
                body(first, b.smaller(b.add(first, self.chunk), row_tiles), begin, end)

            b.each(I64(0), chunks, chunk_of)

        b.claims(b.at(self._record, 120), self.blocks, threads, blocks_of)


def configure(b: Builder, rows: int, size: int) -> None:
    """Set the registers' sizes: ``rows`` of sums and activations, and ``size`` bytes of a row of activations."""
    values = [1] + [0] * 63
    for register in range(8):
        values[16 + 2 * register] = size if ROWS <= register < WEIGHTS else 64
        values[48 + register] = size // 4 if register >= WEIGHTS else rows
    kind = ir.ArrayType(I8, 64)
    table = ir.GlobalVariable(b.module, kind, "registers")
    table.initializer, table.global_constant, table.align = ir.Constant(kind, bytearray(values)), True, 64
    b.matrix("ldtilecfg", table)


def unpacked_bytes(shape: WeightFormat) -> int:
    """Return the bytes of a group of 16 columns: 32 bytes each, float32 scales, and minimums with a minus."""
    return LANES * (GROUP + 4 * (1 + shape.minimum))


def product_of_unpacked(module: ir.Module, shape: WeightFormat) -> ir.Function:
    """Write the product of two row tiles by a block whose weights are unpacked."""
    size = unpacked_bytes(shape)
    kinds = [PTR, I64, PTR, PTR, PTR, I64, *BlockOutput.KINDS, I64]
    b, args = start(module, "unpacked", kinds, internal=True)
    weights, groups, x, factors, planes, _, *output, rows = args
    floats, ints = vec(F32, LANES), vec(I32, LANES)
    kept = 64 * ROUNDED  # bytes of a group's integers
    sums = b.alloca(I8, RING * kept)
    sums.align = 64

    def integers_of(g: ir.Value) -> ir.Value:
        return b.at(sums, b.mul(b.and_(g, I64(RING - 1)), I64(kept)))

    def multiply(g: ir.Value) -> None:
        b.matrix("tilezero", SUMS)
        b.matrix("tileloadd64", ROWS, b.at(x, b.mul(g, I64(ROUNDED * GROUP))), I64(GROUP))
        b.matrix("tileloadd64", WEIGHTS, b.at(weights, b.mul(g, I64(size))), I64(64))
        b.matrix("tdpbsud", SUMS, ROWS, WEIGHTS)
        b.matrix("tilestored64", SUMS, integers_of(g), I64(64))

    def group(g: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        further = b.add(g, I64(RING - 1))
        with b.if_then(b.icmp_signed("<", further, groups)):
            multiply(further)
        at, integers, result = b.at(weights, b.mul(g, I64(size))), integers_of(g), []
        scale, *minimums = [b.read(at, 512 + 64 * n, floats, 64) for n in range(1 + shape.minimum)]
        for row, total in enumerate(totals):
            offset = b.mul(b.add(b.mul(g, I64(ROUNDED)), I64(row)), I64(4))
            integer = b.read(integers, 64 * row, ints, 64)
            if not shape.minimum:
                integer = b.add(integer, b.vector(b.read(planes, offset, I32, 4), LANES))
            factor = b.fmul(scale, b.vector(b.read(factors, offset, F32, 4), LANES))
            total = b.intrinsic("llvm.fma.v16f32", floats, b.sitofp(integer, floats), factor, total)
            for minimum in minimums:
                whole = b.vector(b.read(planes, offset, F32, 4), LANES)
                total = b.intrinsic("llvm.fma.v16f32", floats, minimum, whole, total)
            result.append(total)
        return result

    b.each(I64(0), b.smaller(groups, I64(RING - 1)), multiply)
    totals = b.loop(groups, [const(floats, 0.0)] * ROUNDED, group)
    to = BlockOutput(b, LANES, *output)
    for row, total in enumerate(totals):
        to.store(I64(row), total, rows)
    b.ret_void()
    return b.function


def product_of_bf16(module: ir.Module) -> None:
    """Write ``product`` of bf16 by bf16: two blocks of columns by 32 rows at a time."""
    tiles = {(m, n): _bf16_tiles(module, m, n) for m in (1, 2) for n in (1, 2)}
    b, (record, _, threads) = start(module, "product", [PTR, I64, I64])
    of = Record(b, record)
    configure(b, 16, 64)
    block_bytes = b.mul(of.steps, I64(GROUP * 2 * LANES))

    def blocks_of(block: ir.Value, count: int, first: ir.Value, last: ir.Value) -> None:
        def rows_of(row: ir.Value, wide: int) -> None:
            weights, x = b.at(of.quants, b.mul(block, block_bytes)), b.at(of.x, b.mul(row, of.plane))
            output = of.output(row, b.mul(block, I64(LANES)))
            b.call(tiles[wide, count], [weights, block_bytes, of.steps, x, of.plane, *output, b.sub(last, row)])

        pairs = b.sdiv(b.add(b.sub(last, first), I64(15)), I64(32))
        single = b.add(first, b.mul(pairs, I64(32)))
        b.each(I64(0), pairs, lambda n: rows_of(b.add(first, b.mul(n, I64(32))), 2))
        with b.if_then(b.icmp_signed("<", single, last)):
            rows_of(single, 1)

    def body(first: ir.Value, last: ir.Value, begin: ir.Value, end: ir.Value) -> None:
        first, last = b.mul(first, I64(TILE)), b.smaller(b.mul(last, I64(TILE)), of.rows)
        pairs = b.sdiv(b.sub(end, begin), I64(2))
        single = b.add(begin, b.mul(pairs, I64(2)))
        b.each(I64(0), pairs, lambda n: blocks_of(b.add(begin, b.mul(n, I64(2))), 2, first, last))
        b.each(single, end, lambda block: blocks_of(block, 1, first, last))

    of.walk(threads, body)
    b.matrix("tilerelease")
    b.ret_void()


def _bf16_tiles(module: ir.Module, wide: int, count: int) -> ir.Function:
    """Write the product of 16 or 32 rows by one block of columns or two."""
    kinds = [PTR, I64, I64, PTR, I64, *BlockOutput.KINDS, I64]
    b, (weights, block_bytes, steps, x, stride, *output, rows) = start(module, f"bf16_{wide}_{count}", kinds, True)
    sums = b.alloca(vec(I8, 64), 16 * wide * count)
    sums.align = 64
    cells = [(m, n) for m in range(wide) for n in range(count)]
    for m, n in cells:
        b.matrix("tilezero", SUMS + 2 * m + n)

    def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        for n in range(count):
            at = b.at(weights, b.add(b.mul(index, I64(1024)), b.mul(block_bytes, I64(n))))
            for ahead in range(0, 1024, 64):
                given = b.at(at, AHEAD + ahead), I32(0), I32(3), I32(1)
                b.intrinsic("llvm.prefetch.p0", ir.VoidType(), *given)
            b.matrix("tileloadd64", WEIGHTS + n, at, I64(64))
        for m in range(wide):
            at = b.at(x, b.add(b.mul(index, I64(64)), b.mul(stride, I64(16 * m))))
            b.matrix("tileloadd64", ROWS + m, at, stride)
        for m, n in cells:
            b.matrix("tdpbf16ps", SUMS + 2 * m + n, ROWS + m, WEIGHTS + n)
        return []

    b.loop(steps, [], step)
    for m, n in cells:
        b.matrix("tilestored64", SUMS + 2 * m + n, b.at(sums, 1024 * (n * wide + m)), I64(64))
    out, out_stride, plus, plus_stride, left = output
    bare = b.icmp_unsigned("==", plus, PTR(None))
    for n in range(count):
        given = b.at(out, 64 * n), out_stride, b.select(bare, plus, b.at(plus, 64 * n)), plus_stride
        to = BlockOutput(b, LANES, *given, b.sub(left, I64(LANES * n)))

        def row_of(row: ir.Value, to: BlockOutput = to, n: int = n) -> None:
            to.store(row, b.read(sums, b.add(b.mul(row, I64(64)), I64(1024 * n * wide)), vec(F32, LANES), 64))

        b.each(I64(0), b.smaller(rows, I64(16 * wide)), row_of)
    b.ret_void()
    return b.function
