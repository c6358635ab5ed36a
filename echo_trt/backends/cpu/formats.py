"""Weights in 4 to 8 bits with scales, or in 16 or 32 bits: as plain arrays, packed for the kernels, and what they mean.

A format is a row of ``FORMATS``. Integers are stored without a sign, ``value = scale * (integer - offset) - minimum``,
in groups of 32 along K. ``reference`` is the arithmetic of the kernels in numpy, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from echo_trt.backends.cpu.program import aligned

#: Values along K that share a scale, of weights and of activations.
GROUP = 32
#: Bytes of weights that kernels ask the memory for in advance. Half of it costs 8 % where memory is the limit.
AHEAD = 4096
#: Groups under one pair of 16-bit factors, where the groups' own scales are integers.
SUPER = 8


@dataclass(frozen=True)
class WeightFormat:
    """Describe how a matrix is stored.

    bits      of an integer, 4 to 8; 16 or 32: floats, ``kind`` says which
    offset    what is subtracted from an integer
    minimum   whether groups have one
    integers  how many integer scales a group has, under the 16-bit factors of ``SUPER`` groups: 1, 2 (one per 16
              values, signed), or 0: a group has a 16-bit scale of its own
    """

    name: str
    bits: int
    offset: int = 0
    minimum: bool = False
    integers: int = 0
    kind: str = ""

    @property
    def multiple(self) -> int:
        """Return what K must be a multiple of."""
        return GROUP * SUPER if self.integers else GROUP

    def quant_bytes(self, lanes: int) -> int:
        """Return the bytes of a group's integers in a block of ``lanes`` columns; of floats, of their values."""
        return GROUP * self.bits * lanes // 8

    def scale_bytes(self, lanes: int) -> int:
        """Return the bytes of the scales of ``multiple`` values along K in a block."""
        if self.kind:
            return 0
        factors = 2 * (1 + self.minimum)
        return lanes * (factors + SUPER * (self.integers + self.minimum) if self.integers else factors)


FORMATS = {
    each.name: each
    for each in (
        WeightFormat("q4_0", 4, 8),
        WeightFormat("q4_1", 4, minimum=True),
        WeightFormat("q5_0", 5, 16),
        WeightFormat("q5_1", 5, minimum=True),
        WeightFormat("q8_0", 8, 128),
        WeightFormat("q4_k", 4, minimum=True, integers=1),
        WeightFormat("q5_k", 5, minimum=True, integers=1),
        WeightFormat("q6_k", 6, 32, integers=2),
        WeightFormat("bf16", 16, kind="bf16"),
        WeightFormat("f16", 16, kind="f16"),
        WeightFormat("f32", 32, kind="f32"),
    )
}


@dataclass(frozen=True)
class Weights:
    """Hold a matrix [N, K] in plain order.

    values    uint8 [N, K] of integers; of floats uint16 (the bits) or float32 [N, K]
    scale     float16 [N, K/32], or with integer scales [N, K/256]
    minimum   float16 like ``scale``: what is subtracted, or its factor
    scales    uint8 or (q6_k) int8 [N, K/32, integers]
    minimums  uint8 [N, K/32]
    """

    format: WeightFormat
    values: np.ndarray
    scale: np.ndarray = field(default_factory=lambda: np.empty(0, np.float16))
    minimum: np.ndarray | None = None
    scales: np.ndarray | None = None
    minimums: np.ndarray | None = None

    def group_scales(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return scales float32 [N, K/32, 1 or 2] and minimums float32 [N, K/32], as a kernel computes them."""
        scale = self.scale.astype(np.float32)
        minimum = None if self.minimum is None else self.minimum.astype(np.float32)
        if self.scales is None:
            return scale[..., None], minimum
        scale = np.repeat(scale, SUPER, 1)[..., None] * self.scales.astype(np.float32)
        if minimum is not None and self.minimums is not None:
            minimum = np.repeat(minimum, SUPER, 1) * self.minimums.astype(np.float32)
        return scale, minimum

    def dequantise(self) -> np.ndarray:
        """Return the matrix as float32 [N, K]."""
        if self.format.kind == "bf16":
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        if self.format.kind:
            return (self.values.view(np.float16) if self.format.kind == "f16" else self.values).astype(np.float32)
        scales, minimums = self.group_scales()
        rows, columns = self.values.shape
        centred = self.values.astype(np.float32) - np.float32(self.format.offset)
        grouped = centred.reshape(rows, columns // GROUP, scales.shape[2], -1) * scales[..., None]
        if minimums is not None:
            grouped = grouped - minimums[..., None, None]
        return grouped.reshape(rows, columns)


@dataclass(frozen=True)
class PackedWeights:
    """Hold a matrix [N, K] in the kernels' order, in blocks of ``lanes`` columns of the product.

    quants  uint8 [blocks, K/32, vectors, lanes, 4]: byte t of vector v holds k = 8v + t in its low half and 8v + 4 + t
            in its high half; what 5 and 6 bits have above, and 8 bits: ``_vectors``. Floats: [blocks, K, lanes]; bf16:
            [blocks, K/2, lanes, 2]
    scales  uint8 [blocks, K/multiple, scale_bytes]: 16-bit factors, then each group's integer scales and minimum
    """

    format: WeightFormat
    rows: int
    columns: int
    lanes: int
    quants: np.ndarray
    scales: np.ndarray


def pack(weights: Weights, lanes: int) -> PackedWeights:
    """Pack a matrix for a kernel whose vectors hold ``lanes`` int32; N is padded to a multiple of it by zeros."""
    packed = _empty(weights.format, *weights.values.shape, lanes)
    _fill(packed, 0, weights)
    return packed


def pack_gguf(name: str, rows: np.ndarray, lanes: int) -> PackedWeights:
    """Pack a matrix of a GGUF file, as ``from_gguf`` reads it, part by part, so that parts stay in the CPU's cache."""
    shape = FORMATS[name]
    columns = rows.shape[1] // GGUF_BYTES[name] * (GROUP * SUPER if shape.integers else GROUP)
    packed = _empty(shape, len(rows), columns, lanes)
    part = max(1, PART // columns // lanes) * lanes
    for begin in range(0, len(rows), part):
        _fill(packed, begin // lanes, from_gguf(name, rows[begin : begin + part]))
    return packed


#: Weights that are packed at a time.
PART = 256 * 1024


def _empty(shape: WeightFormat, rows: int, columns: int, lanes: int) -> PackedWeights:
    if columns % shape.multiple:
        raise ValueError(f"a matrix in {shape.name} has {columns} columns, must be a multiple of {shape.multiple}")
    blocks = -(-rows // lanes)
    quants = aligned(blocks * columns // GROUP * shape.quant_bytes(lanes) + AHEAD)
    quants[-AHEAD:] = 0  # goes into the file
    scales = aligned(blocks * columns // shape.multiple * shape.scale_bytes(lanes))
    return PackedWeights(shape, rows, columns, lanes, quants, scales)


def _fill(packed: PackedWeights, first: int, weights: Weights) -> None:
    """Pack rows of a matrix into the blocks from ``first`` on."""
    shape, lanes, (rows, columns) = packed.format, packed.lanes, weights.values.shape
    blocks, groups = -(-rows // lanes), columns // GROUP

    def padded(values: np.ndarray) -> np.ndarray:
        """Return [blocks, lanes, ...]."""
        short = blocks * lanes - rows
        values = np.concatenate([values, np.zeros((short, *values.shape[1:]), values.dtype)]) if short else values
        return values.reshape(blocks, lanes, *values.shape[1:])

    values = padded(weights.values)
    quants = packed.quants[:-AHEAD].reshape(-1, groups * shape.quant_bytes(lanes))[first : first + blocks]
    if shape.kind:
        if shape.kind == "bf16":
            values = np.ascontiguousarray(values).view(np.uint32)
        quants.view(values.dtype).reshape(blocks, -1, lanes)[:] = values.swapaxes(1, 2)
        return
    quads = np.ascontiguousarray(values).view(np.uint32).reshape(blocks, lanes, groups, 8)
    quants.view(np.uint32).reshape(blocks, groups, -1, lanes)[:] = _vectors(quads, shape.bits).transpose(0, 2, 3, 1)
    steps, width = columns // shape.multiple, shape.scale_bytes(lanes)
    scales = packed.scales.reshape(-1, steps, width)[first : first + blocks]
    factors = [weights.scale] if weights.minimum is None else [weights.scale, weights.minimum]
    size = 2 * lanes * len(factors)
    stacked = np.stack([padded(each).swapaxes(1, 2) for each in factors], 2)  # [blocks, steps, 1 or 2, lanes]
    halves = np.ascontiguousarray(stacked)
    scales[..., :size] = halves.view(np.uint8).reshape(blocks, steps, size)
    if weights.scales is not None:
        integers = [padded(weights.scales.view(np.uint8)).reshape(blocks, lanes, steps, SUPER, -1)]
        if weights.minimums is not None:
            integers.append(padded(weights.minimums).reshape(blocks, lanes, steps, SUPER, 1))
        tail = np.concatenate(integers, 4).transpose(0, 2, 3, 4, 1)
        scales[..., size:] = tail.reshape(blocks, steps, -1)


def _vectors(quads: np.ndarray, bits: int) -> np.ndarray:
    """Return uint32 [..., vectors] of four integers each, from [..., 8] of one integer per byte."""
    if bits == 8:
        return quads
    low = quads & 0x0F0F0F0F
    halves = low[..., 0::2] | low[..., 1::2] << 4
    if bits == 4:
        return halves
    high = quads >> 4 & (0x01010101 if bits == 5 else 0x03030303)
    step = bits - 4  # bits above of quad i stand at i * step, 8 bits to a byte
    shifts = np.arange(8, dtype=np.uint32) * step % 8
    above = np.bitwise_or.reduce((high << shifts).reshape(*high.shape[:-1], step, -1), axis=-1)
    return np.concatenate([halves, above], axis=-1)


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round float32 [M, K] to 8 bits per group of 32, as the kernels do.

    Returns int8 [M, K/32, 32], scales float32 [M, K/32] and sums int32 [M, K/32, 2] of 16 integers each.
    """
    grouped = x.reshape(len(x), -1, GROUP)
    largest = np.abs(grouped).max(2)
    some = largest > np.float32(TINY)
    inverse = np.where(some, np.float32(127) / np.where(some, largest, np.float32(1)), np.float32(0))
    values = np.rint(grouped * inverse[..., None]).astype(np.int8)
    scale = np.where(some, largest / np.float32(127), np.float32(0))
    return values, scale, values.reshape(*values.shape[:2], 2, -1).sum(3, dtype=np.int32)


#: A group whose largest activation is at most this becomes zeros: 127 divided by less is infinite.
TINY = 2.0**-100


def reference(x: np.ndarray, weights: Weights, bf16: str = "") -> np.ndarray:
    """Multiply float32 [M, K] by a matrix [N, K] as the kernels do: float32 [M, N], equal to theirs bit for bit.

    ``bf16``: see ``InstructionSet``. Numbers are normal ones, since its instructions take smaller ones for 0.
    """
    if weights.format.kind:
        return _reference_of_floats(x, weights, bf16)
    total = np.zeros((len(x), len(weights.values)), np.float32)
    values, factors, sums = quantise(x)
    scales, minimums = weights.group_scales()
    parts = scales.shape[2]
    centred = weights.values.reshape(len(weights.values), -1, parts, GROUP // parts) - np.float32(weights.format.offset)
    rounded = values.astype(np.float32).reshape(len(x), -1, parts, GROUP // parts)
    whole = factors * sums.sum(2).astype(np.float32)
    for g in range(factors.shape[1]):
        for part in range(parts):
            integer = rounded[:, g, part] @ centred[:, g, part].T  # exact: below 2 ** 24
            total = fma(integer, scales[:, g, part] * factors[:, g, None], total)
        if minimums is not None:
            total = fma(-minimums[:, g], whole[:, g, None], total)
    return total


def _reference_of_floats(x: np.ndarray, weights: Weights, bf16: str) -> np.ndarray:
    matrix, form = weights.dequantise(), bf16 if weights.format.kind == "bf16" else ""
    columns = np.arange(x.shape[1])
    if form:
        bits = np.ascontiguousarray(x).view(np.uint32)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

    def chain(order: np.ndarray) -> np.ndarray:
        total = np.zeros((len(x), len(matrix)), np.float32)
        for k in order:
            total = fma(x[:, k, None], matrix[:, k], total)
        return total

    if form != "tiles":
        return chain(columns ^ 1 if form else columns)
    total = np.zeros((len(x), len(matrix)), np.float32)
    for begin in range(0, len(columns), GROUP):
        part = columns[begin : begin + GROUP]
        total = total + (chain(part[::2]) + chain(part[1::2]))
    return total


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return float32 ``a * b + c`` rounded once.

    The product is exact in float64. Its sum with ``c`` is rounded to odd there: where something was cut off, the last
    bit is set. float64 has more than twice the bits of float32, so that the rounding to float32 is the only one.
    """
    product, c = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    return odd.view(np.float64).astype(np.float32)


def quantised(matrix: np.ndarray, name: str) -> Weights:
    """Round float [N, K] to "q8_0" or "q4_0" per group of 32; 4 bits with the scale of the least squared error."""
    shape = FORMATS[name]
    grouped = matrix.astype(np.float32).reshape(len(matrix), -1, GROUP)
    if name == "q8_0":
        scale = (np.abs(grouped).max(2) / np.float32(127)).astype(np.float16)
    else:  # the largest value becomes -8; then the scale that suits the integers best
        largest = np.take_along_axis(grouped, np.abs(grouped).argmax(2)[..., None], 2)[..., 0]
        integers = _integers(grouped, (largest / np.float32(-8)).astype(np.float16), shape)
        squares = (integers * integers).sum(2)
        scale = ((integers * grouped).sum(2) / np.where(squares > 0, squares, 1)).astype(np.float16)
    integers = _integers(grouped, scale, shape) + np.float32(shape.offset)
    return Weights(shape, integers.astype(np.uint8).reshape(matrix.shape), scale)


def _integers(grouped: np.ndarray, scale: np.ndarray, shape: WeightFormat) -> np.ndarray:
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))[..., None]
    return np.rint(grouped / divisor).clip(-shape.offset, shape.offset - 1)


#: Bytes of a block of GGUF's formats; K-quants have 256 values in a block, the others 32.
GGUF_BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "q4_k": 144, "q5_k": 176, "q6_k": 210}


def from_gguf(name: str, rows: np.ndarray) -> Weights:
    """Read a matrix of a GGUF file: uint8 [N, bytes of a row], in the format ``name``; nothing is rounded."""
    shape = FORMATS[name]
    blocks = rows.reshape(len(rows), -1, GGUF_BYTES[name])
    if name == "q6_k":
        return _q6_k(shape, blocks)
    heads = np.ascontiguousarray(blocks[..., : 2 * (1 + shape.minimum)]).view(np.float16)
    scale, minimum = heads[..., 0], heads[..., 1] if shape.minimum else None
    rest = blocks[..., 2 * heads.shape[2] :]
    if shape.integers:
        return _q4_k(shape, rest, scale, minimum)
    if name == "q8_0":
        return Weights(shape, (rest ^ 0x80).reshape(len(rows), -1), scale)
    values = np.concatenate([rest[..., -16:] & 15, rest[..., -16:] >> 4], axis=-1)
    if shape.bits == 5:
        values |= np.unpackbits(rest[..., :4], axis=-1, bitorder="little") << 4
    return Weights(shape, values.reshape(len(rows), -1), scale, None if minimum is None else -minimum)


def _q4_k(shape: WeightFormat, rest: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> Weights:
    """Read q4_k and q5_k: 8 scales and minimums of 6 bits in 12 bytes, a bit of each value, then 4 bits."""
    rows, first, second, third = len(rest), rest[..., :4], rest[..., 4:8], rest[..., 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minimums = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    low = rest[..., -128:].reshape(rows, -1, 4, 1, 32)
    values = np.concatenate([low & 15, low >> 4], axis=3).reshape(rows, -1, 8, 32)
    if shape.bits == 5:
        values |= (rest[..., 12:44][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return Weights(
        shape, values.reshape(rows, -1), scale, minimum, scales.reshape(rows, -1, 1), minimums.reshape(rows, -1)
    )


def _q6_k(shape: WeightFormat, blocks: np.ndarray) -> Weights:
    """Read q6_k: per 128 values 64 bytes of 4 bits and 32 of 2 bits; then 16 scales, and their factor."""
    rows = len(blocks)
    low = blocks[..., :128].reshape(rows, -1, 2, 1, 64)
    values = np.concatenate([low & 15, low >> 4], axis=3).reshape(rows, -1, 2, 4, 32)
    high = blocks[..., 128:192].reshape(rows, -1, 2, 1, 32)
    values |= (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3) << 4
    scale = np.ascontiguousarray(blocks[..., 208:]).view(np.float16)[..., 0]
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).reshape(rows, -1, 2)
    return Weights(shape, values.reshape(rows, -1), scale, scales=scales)
