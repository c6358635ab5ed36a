"""A role to the file of a CPU engine: matrices in their formats, packed for the kernels, and what is beside them."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from echo_trt.backends.cpu.engine import CPUEngine
from echo_trt.backends.cpu.formats import AHEAD, FORMATS, GGUF_BYTES, PackedWeights, Weights, pack, pack_gguf, quantised
from echo_trt.backends.cpu.network_file import NetworkWriter, network_writer
from echo_trt.backends.cpu.products import instruction_set
from echo_trt.backends.first_layers import in_blocks, layers_within
from echo_trt.backends.kind import CompiledRole
from echo_trt.models.hybrid_config import CONV_PAST
from echo_trt.models.layers import Rotary
from echo_trt.models.roles import Role, TargetModule
from echo_trt.models.weights import heights

UNIT = 32  # to a multiple of which widths are padded, and a head's halves to one of half of it
THREADS = 2  # that pack matrices; larger: more memory
FLOATS = {"fp32": "f32", "bf16": "bf16"}
#: Matrices that have 8 bits in int4, too, since 4 change the choice of tokens most there.
EIGHT_BITS = ("embed.weight", "lm_head.weight")
#: Parts of a delta net's projection, and its arrays.
DELTA_PARTS, DELTA_ARRAYS = ("mixed", "gate", "write", "decay"), ("conv", "decay_log", "decay_bias")
SMALL = 64  # rows of a matrix up to which it has 8 bits, too
ROUTER = ".router.weight"  # which stays in floats: a little less changes the choice of experts


def compile_role(role: Role, path: Path, precision: str, facts: dict[str, str] | None = None) -> CompiledRole:
    """Write ``role`` to ``path`` in ``precision``; ``facts`` gets what formats its matrices have."""
    config = role.network.config
    header = {
        "role": role.name,
        "config": dataclasses.asdict(config),
        "windows": [config.window_of(layer) for layer in range(role.num_layers)],
        "states": getattr(role, "states", {}),
        "key_head": getattr(config, "key_head", []),
        "gated": config.gated,
        "setting": list(role.feature_layers) if isinstance(role, TargetModule) else role.top_k,
    }
    with network_writer(path, header) as writer:
        _Writing(role, writer, precision).write()
    if facts is not None:
        counts = Counter(kind for kind, *_ in writer.matrices.values())
        facts[f"matrices, {path.stem}"] = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    layers = layers_within(role) if in_blocks(role) else 0
    return CompiledRole(path.name, partial(CPUEngine, path, precision, layers=layers), layers=layers or None)


def spread(size: int, parts: int = 1, halves: bool = False) -> tuple[np.ndarray, int]:
    """Return where ``parts`` of ``size`` numbers stand when each is padded, int64 [parts * size], and the whole length.

    halves  whether a part's first half and its second one are padded apart, as heads are
    """
    pieces, unit = (2 * parts, UNIT // 2) if halves else (parts, UNIT)
    piece = size * parts // pieces
    padded = -(-piece // unit) * unit
    begin = np.arange(pieces)[:, None] * padded
    return (begin + np.arange(piece)).reshape(-1), pieces * padded


def rotated(size: int, parts: int, turned: int) -> tuple[np.ndarray, int]:
    """Return what ``spread`` does of heads by halves, where rotation turns a head's first ``turned`` numbers alone.

    The halves of these begin the head's halves, so that numbers which turn together stand as far apart as ever.
    """
    where, length = spread(size, parts, halves=True)
    half, rest = turned // 2, (size - turned) // 2
    order = np.r_[:half, size // 2 : size // 2 + half, half : half + rest, size // 2 + half : size]
    return where.reshape(parts, size)[:, order].reshape(-1), length


def _placed(values: np.ndarray, where: tuple[np.ndarray, int] | None, axis: int) -> np.ndarray:
    """Move rows or columns to their padded positions."""
    if where is None or (where[1] == values.shape[axis] and (np.diff(where[0]) == 1).all()):
        return values
    shape = list(values.shape)
    shape[axis] = where[1]
    out = np.zeros(shape, values.dtype)
    out[(slice(None),) * axis + (where[0],)] = values
    return out


def _ahead(make: Callable[[Any], Any], given: Sequence[Any]) -> Iterator[Any]:
    """Yield what ``make`` makes of each, in order, while THREADS make the next ones."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque[Future[Any]]()
        for each in given:
            waiting.append(pool.submit(make, each))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a parameter that has a name of its own in the file, and where its rows and columns are put."""

    name: str
    rows: slice = dataclasses.field(default_factory=lambda: slice(None))
    to_rows: tuple[np.ndarray, int] | None = None
    to_columns: tuple[np.ndarray, int] | None = None


class _Writing:
    def __init__(self, role: Role, writer: NetworkWriter, precision: str):
        self._network, self._writer, self._precision = role.network, writer, precision
        self._config = config = role.network.config
        self._hidden = spread(config.hidden_size)
        #: The layer that reads an embedding and a hidden state side by side, EAGLE-3's.
        self._pairs = "attention." if role.name == "head" or getattr(config, "anchored", False) else None

    def write(self) -> None:
        state = self._network.state_dict()
        parts = [(name, index, part) for name in state for index, part in enumerate(self._parts(name))]

        def packed(given: tuple[str, int, _Part]) -> PackedWeights | np.ndarray:
            name, index, part = given
            tensor = state[name]
            if part.name.endswith(".conv"):  # [C, 1, taps], the token's own last
                taps = tensor.float().squeeze(1).t().numpy()
                return np.pad(taps, ((CONV_PAST + 1 - len(taps), 0), (0, 0)))
            if tensor.dim() == 3:
                return self._stacked(name, index, part, tensor)
            if tensor.dim() == 2:
                return self._packed(name, index, part, tensor[part.rows])
            values = tensor[part.rows].float().numpy() if tensor.is_floating_point() else tensor.numpy()
            return _placed(values, part.to_rows, 0)

        for (_, _, part), values in zip(parts, _ahead(packed, parts), strict=True):
            if isinstance(values, PackedWeights):
                self._writer.matrix(part.name, values)
            else:
                self._writer.array(part.name, values)
        self._write_angles("rotary", self._network.rotary)
        if self._network.rotary.local:
            self._write_angles("local", self._network.rotary.local)

    def _write_angles(self, name: str, rotary: Rotary) -> None:
        half, width = rotary.cos.shape[1] // 2, -(-self._config.head_dim // UNIT) * UNIT // 2
        for part in ("cos", "sin"):
            table = np.full((len(rotary.cos), width), float(part == "cos"), np.float32)  # the others are not rotated
            table[:, :half] = getattr(rotary, part)[:, :half].numpy()
            self._writer.array(f"{name}.{part}", table)

    def _parts(self, name: str) -> Iterator[_Part]:
        config, (stem, _, leaf) = self._config, name.rpartition(".")
        above, _, module = stem.rpartition(".")
        above += "." if above else ""
        ends, size = np.cumsum([0, *heights(config)]), config.head_dim
        turned = getattr(config, "rotary_dim", size)
        if module == "qkv":
            columns = spread(config.hidden_size, 2) if above == self._pairs else self._hidden
            rows = self._queries, rotated(size, config.num_kv_heads, turned), spread(size, config.num_kv_heads, True)
            for i, kind in enumerate(("query", "key", "value")):
                yield _Part(f"{above}{kind}.{leaf}", slice(ends[i], ends[i + 1]), rows[i], columns)
        elif module == "project" and hasattr(config, "linear_projected"):
            for kind, end, height in zip(DELTA_PARTS, np.cumsum(heights(config, 4)), heights(config, 4), strict=True):
                yield _Part(f"{above}{kind}.{leaf}", slice(end - height, end), None, self._hidden)
        elif module == "gate_up":
            size = config.intermediate_size
            yield _Part(f"{above}gate.{leaf}", slice(size), None, self._hidden)
            yield _Part(f"{above}up.{leaf}", slice(size, None), None, self._hidden)
        elif leaf == "gate_up":
            size = config.expert_size
            yield _Part(f"{stem}.gate.weight", slice(size), None, self._hidden)
            yield _Part(f"{stem}.up.weight", slice(size, None), None, self._hidden)
        elif leaf == "down":
            yield _Part(f"{name}.weight", to_columns=spread(config.expert_size))
        elif module == "out":
            yield _Part(name, to_columns=spread(config.head_dim, config.num_heads, halves=True))
        elif module == "down":
            yield _Part(name, to_columns=spread(config.intermediate_size))
        elif module == "fc":
            theirs = getattr(config, "target_hidden_size", 0)  # of an MTP head: an embedding and one of its own size
            wide = (theirs, config.feature_size // theirs) if theirs else (config.hidden_size, 2)
            yield _Part(name, to_columns=spread(*wide))
        elif module in ("query_norm", "key_norm"):
            yield _Part(name, to_rows=rotated(size, 1, turned))
        elif above == "fc_norms.":
            yield _Part(name, to_rows=spread(config.target_hidden_size))
        elif (
            leaf == "target_ids"
            or module in ("output", "project")
            or leaf in DELTA_ARRAYS
            or name.endswith("attention.norm")
        ):
            yield _Part(name)
        else:  # norms of hidden states, embedding and output matrix
            flat = module.endswith("norm") or leaf == "mask_state"
            yield _Part(name, to_rows=self._hidden if flat else None, to_columns=None if flat else self._hidden)

    @property
    def _queries(self) -> tuple[np.ndarray, int]:
        """Where queries stand; where each is followed by its gate, all gates stand before them, as outputs do."""
        config, size = self._config, self._config.head_dim
        queries, length = rotated(size, config.num_heads, getattr(config, "rotary_dim", size))
        if not config.gated:
            return queries, length
        gates, _ = spread(size, config.num_heads, halves=True)
        both = np.stack((length + queries.reshape(-1, size), gates.reshape(-1, size)), axis=1)
        return both.reshape(-1), 2 * length

    def _stacked(self, name: str, index: int, part: _Part, tensor: torch.Tensor) -> PackedWeights:
        """Pack a part of all experts' matrices [experts, N, K], one behind the other, each padded to whole blocks."""
        stride = len(list(self._parts(name)))
        packed = [
            self._packed(name, expert * stride + index, part, matrix[part.rows]) for expert, matrix in enumerate(tensor)
        ]
        rows = len(packed) * -(-packed[0].rows // packed[0].lanes) * packed[0].lanes
        quants = np.concatenate([*(each.quants[:-AHEAD] for each in packed), np.zeros(AHEAD, np.uint8)])
        scales = np.concatenate([each.scales for each in packed])
        return dataclasses.replace(packed[0], rows=rows, quants=quants, scales=scales)

    def _packed(self, name: str, index: int, part: _Part, tensor: torch.Tensor) -> PackedWeights:
        """Pack a part of a matrix, as its GGUF file has it where that has blocks of few bits and nothing is padded."""
        lanes, router = instruction_set().lanes, name.endswith(ROUTER)
        few = self._precision.startswith("int") and not router
        if (read := self._network.stored.get(name)) and (few or tensor.is_meta):
            kind, blocks = read(index)
            moved = zip((part.to_rows, part.to_columns), tensor.shape, strict=True)
            padded = any(to and to[1] != size for to, size in moved)
            if few and kind in GGUF_BYTES and not padded:
                return pack_gguf(kind, _placed(blocks.numpy(), part.to_rows, 0), lanes)
            if tensor.is_meta:
                tensor = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind.upper()]))
        tensor = tensor if self._precision == "bf16" and tensor.dtype == torch.bfloat16 else tensor.float()
        # what a file has in few bits that are not taken as they are is not rounded to four again
        in_four = self._precision == "int4" and not read and not name.endswith(EIGHT_BITS) and len(tensor) >= SMALL
        kind = FLOATS.get(self._precision, "f32" if router else "q4_0" if in_four else "q8_0")
        return pack(self._rounded(tensor, part, kind), lanes)

    def _rounded(self, tensor: torch.Tensor, part: _Part, kind: str) -> Weights:
        """Return a matrix, its rows and columns put where they belong, in a format."""
        if kind == "bf16":
            values = tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        else:
            values = tensor.numpy()
        values = _placed(_placed(values, part.to_rows, 0), part.to_columns, 1)
        return Weights(FORMATS[kind], values) if FORMATS[kind].kind else quantised(values, kind)
