"""Blocks of GGUF files as weights of the kernels' formats."""

from __future__ import annotations

import numpy as np

from echo_trt.backends.cpu.formats import FORMATS, GROUP, Weights


def from_gguf(name: str, rows: np.ndarray) -> Weights:
    """Return the matrix whose rows of blocks of the type ``name`` are given, uint8 [N, bytes]; no value changes."""
    shape, count = FORMATS[name], len(rows)
    if not shape.integers:
        size = 2 + 2 * shape.minimum + 4 * (shape.bits == 5) + (GROUP if shape.bits == 8 else GROUP // 2)
        blocks = rows.reshape(count, -1, size)
        scale, begin = _halves(blocks, 0), 2 + 2 * shape.minimum
        minimum = -_halves(blocks, 2) if shape.minimum else None
        high = None
        if shape.bits == 5:
            high = np.unpackbits(blocks[..., begin : begin + 4], axis=-1, bitorder="little")
            begin += 4
        packed = blocks[..., begin:]
        if shape.bits == 8:
            values = packed ^ 0x80
        else:
            values = np.concatenate((packed & 15, packed >> 4), -1)
            values = values if high is None else values | high << 4
        return Weights(shape, values.reshape(count, -1), scale, minimum)
    if name == "q6_k":
        blocks = rows.reshape(count, -1, 210)
        low, high = blocks[..., :128].reshape(count, -1, 2, 1, 2, 32), blocks[..., 128:192].reshape(count, -1, 2, 1, 1, 32)
        shifts = np.arange(2, dtype=np.uint8)[:, None, None]
        nibbles = low >> 4 * shifts & 15  # [N, blocks, half, nibble, 2, 32]
        above = high >> (2 * np.arange(4, dtype=np.uint8).reshape(2, 2, 1)) & 3
        scales = blocks[..., 192:208].view(np.int8).reshape(count, -1, 2)
        values = (nibbles | above << 4).reshape(count, -1)
        return Weights(shape, values, _halves(blocks, 208), scales=scales)
    blocks = rows.reshape(count, -1, 144 if shape.bits == 4 else 176)
    packed = blocks[..., -128:].reshape(count, -1, 4, 1, 32)
    values = packed >> np.array([0, 4], np.uint8)[:, None] & 15
    if shape.bits == 5:
        shifts = np.arange(8, dtype=np.uint8).reshape(4, 2, 1)
        values = values | (blocks[..., 16:48].reshape(count, -1, 1, 1, 32) >> shifts & 1) << 4
    low, middle, high = (blocks[..., begin : begin + 4] for begin in (4, 8, 12))
    scales = np.concatenate((low & 63, high & 15 | low >> 6 << 4), -1).reshape(count, -1, 1)
    minimums = np.concatenate((middle & 63, high >> 4 | middle >> 6 << 4), -1).reshape(count, -1)
    return Weights(shape, values.reshape(count, -1), _halves(blocks, 0), _halves(blocks, 2), scales, minimums)


def _halves(blocks: np.ndarray, begin: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., begin : begin + 2]).view(np.float16)[..., 0]
