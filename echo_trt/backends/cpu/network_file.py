"""A network in one file: a header in JSON, and arrays that are mapped as they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from echo_trt.backends.cpu.formats import FORMATS, PackedWeights
from echo_trt.errors import UserError

MAGIC, ALIGNMENT = b"echocpu2", 64


class NetworkWriter:
    """Writes arrays and packed matrices by name as they come; the header follows at the end.

    matrices  format, rows, columns and lanes of what was written, by name
    """

    def __init__(self, file: BinaryIO):
        self._file, self._arrays, self.matrices = file, {}, {}
        file.write(MAGIC + bytes(ALIGNMENT - len(MAGIC)))

    def array(self, name: str, values: np.ndarray) -> None:
        begin = self._aligned()
        self._file.write(np.ascontiguousarray(values).data)
        self._arrays[name] = {"begin": begin, "type": values.dtype.str, "shape": values.shape}

    def matrix(self, name: str, weights: PackedWeights) -> None:
        for part in ("quants", "scales"):
            self.array(f"{name}.{part}", getattr(weights, part))
        self.matrices[name] = [weights.format.name, weights.rows, weights.columns, weights.lanes]

    def close(self, header: dict[str, Any]) -> None:
        begin = self._aligned()
        text = json.dumps(header | {"arrays": self._arrays, "matrices": self.matrices}).encode()
        self._file.write(text)
        self._file.seek(len(MAGIC))
        self._file.write(np.array([begin, len(text)], np.int64).tobytes())

    def _aligned(self) -> int:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        return self._file.tell()


@contextmanager
def network_writer(path: Path, header: dict[str, Any]) -> Iterator[NetworkWriter]:
    with path.open("wb") as file:
        writer = NetworkWriter(file)
        yield writer
        writer.close(header)


class NetworkFile:
    """The file, opened: its ``header``, and arrays in its mapped memory."""

    def __init__(self, path: Path):
        try:
            self._map = np.memmap(path, np.uint8, "r")
            if self._map[: len(MAGIC)].tobytes() != MAGIC:
                raise ValueError("another kind of file, or an earlier version's")
            begin, length = self._map[len(MAGIC) : len(MAGIC) + 16].view(np.int64).tolist()
            self.header: dict[str, Any] = json.loads(self._map[begin : begin + length].tobytes())
        except (ValueError, OSError) as error:
            raise UserError(f"{path} holds no network of echo-trt ({error}); build the bundle again.") from error

    def names(self) -> set[str]:
        return {*self.header["arrays"], *self.header["matrices"]}

    def array(self, name: str) -> np.ndarray:
        stored = self.header["arrays"][name]
        kind, shape, begin = np.dtype(stored["type"]), tuple(stored["shape"]), stored["begin"]
        end = begin + kind.itemsize * int(np.prod(shape))
        return np.frombuffer(self._map, kind, (end - begin) // kind.itemsize, begin).reshape(shape)

    def matrix(self, name: str) -> PackedWeights:
        kind, rows, columns, lanes = self.header["matrices"][name]
        quants, scales = self.array(f"{name}.quants"), self.array(f"{name}.scales")
        return PackedWeights(FORMATS[kind], rows, columns, lanes, quants, scales)
