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
#: Groups under one pair of 16-bit factors, where the groups' own scales are integers.
SUPER = 8


@dataclass(frozen=True)
class Format:
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
        Format("q4_0", 4, 8),
        Format("q4_1", 4, minimum=True),
        Format("q5_0", 5, 16),
        Format("q5_1", 5, minimum=True),
        Format("q8_0", 8, 128),
        Format("q4_k", 4, minimum=True, integers=1),
        Format("q5_k", 5, minimum=True, integers=1),
        Format("q6_k", 6, 32, integers=2),
        Format("bf16", 16, kind="bf16"),
        Format("f16", 16, kind="f16"),
        Format("f32", 32, kind="f32"),
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

    format: Format
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
            in its high half; what 5 and 6 bits have above, and 8 bits: ``_vectors``. Floats: [blocks, K, lanes]
    scales  uint8 [blocks, K/multiple, scale_bytes]: 16-bit factors, then each group's integer scales and minimum
    """

    format: Format
    rows: int
    columns: int
    lanes: int
    quants: np.ndarray
    scales: np.ndarray


def pack(weights: Weights, lanes: int) -> PackedWeights:
    """Pack a matrix for a kernel whose vectors hold ``lanes`` int32; N is padded to a multiple of it by zeros."""
    shape, (rows, columns) = weights.format, weights.values.shape
    if columns % shape.multiple:
        raise ValueError(f"a matrix in {shape.name} has {columns} columns, must be a multiple of {shape.multiple}")
    blocks, groups = -(-rows // lanes), columns // GROUP
    quants = aligned(blocks * groups * shape.quant_bytes(lanes) + 8192)  # kernels prefetch beyond the end
    scales = aligned(blocks * columns // shape.multiple * shape.scale_bytes(lanes) + 64)

    def padded(values: np.ndarray) -> np.ndarray:
        """Return [blocks, lanes, ...]."""
        short = blocks * lanes - rows
        values = np.concatenate([values, np.zeros((short, *values.shape[1:]), values.dtype)]) if short else values
        return values.reshape(blocks, lanes, *values.shape[1:])

    values = padded(weights.values)
    if shape.kind:
        out = quants[: values.nbytes].view(values.dtype).reshape(blocks, columns, lanes)
        out[:] = values.swapaxes(1, 2)
        return PackedWeights(shape, rows, columns, lanes, quants, scales)
    words = quants[: blocks * groups * shape.quant_bytes(lanes)].view(np.uint32).reshape(blocks, groups, -1, lanes)
    quads = np.ascontiguousarray(values).view(np.uint32).reshape(blocks, lanes, groups, 8)
    words[:] = _vectors(quads, shape.bits).transpose(0, 2, 3, 1)
    if shape.integers:
        _pack_super(weights, padded, scales, lanes)
    else:
        out = scales[: scales.size - 64].view(np.float16).reshape(blocks, groups, -1, lanes)
        out[:, :, 0] = padded(weights.scale).swapaxes(1, 2)
        if weights.minimum is not None:
            out[:, :, 1] = padded(weights.minimum).swapaxes(1, 2)
    return PackedWeights(shape, rows, columns, lanes, quants, scales)


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


def _pack_super(weights: Weights, padded, scales: np.ndarray, lanes: int) -> None:  # noqa: ANN001
    shape = weights.format
    width, factors = shape.scale_bytes(lanes), 2 * lanes * (1 + shape.minimum)
    out = scales[: scales.size - 64].reshape(-1, weights.scale.shape[1], width)
    head = np.ascontiguousarray(out[..., :factors]).view(np.float16).reshape(*out.shape[:2], -1, lanes)
    tail = out[..., factors:].reshape(*out.shape[:2], SUPER, -1, lanes)
    head[:, :, 0] = padded(weights.scale).swapaxes(1, 2)
    integers = padded(weights.scales.view(np.uint8)).reshape(len(out), lanes, -1, SUPER, shape.integers)
    tail[..., : shape.integers, :] = integers.transpose(0, 2, 3, 4, 1)
    if shape.minimum:
        head[:, :, 1] = padded(weights.minimum).swapaxes(1, 2)
        tail[..., shape.integers, :] = padded(weights.minimums).reshape(len(out), lanes, -1, SUPER).transpose(0, 2, 3, 1)
    out[..., :factors] = head.view(np.uint8).reshape(*out.shape[:2], -1)
    out[..., factors:] = tail.reshape(*out.shape[:2], -1)


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


def reference(x: np.ndarray, weights: Weights) -> np.ndarray:
    """Multiply float32 [M, K] by a matrix [N, K] as the kernels do: float32 [M, N], equal to theirs bit for bit."""
    total = np.zeros((len(x), len(weights.values)), np.float32)
    if weights.format.kind:
        matrix = weights.dequantise()
        for k in range(x.shape[1]):
            total = fma(x[:, k, None], matrix[:, k], total)
        return total
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
