"""The engine for TensorRT and TensorRT-RTX, with caches and large outputs on the device and calls as CUDA graphs.

TensorRT with the plugin takes packed calls over a paged pool; the native graph takes padded calls over linear caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda.calls import Graphs, Staging
from echo_trt.backends.cuda.device import check_room, compute_capability, cuda_device, launching_kernels, own_stream
from echo_trt.backends.cuda.device_rows import DeviceFeatureCache, compile_choice, gathered
from echo_trt.backends.cuda.engine import DeviceEngine
from echo_trt.backends.cuda.levels import parts_of_level
from echo_trt.backends.cuda.sizes import LARGEST, SIZES, CallBounds, empty_calls, graph_sizes
from echo_trt.backends.cuda.transfers import PACKED, pack_results, send
from echo_trt.backends.padded import ROW_OUTPUTS, SlotLayout
from echo_trt.backends.parallel.rank_group import RankGroup
from echo_trt.backends.tensorrt.calls import CallLimits, MicroBatch, in_words, linear_pieces, packed_pieces
from echo_trt.backends.tensorrt.library import COMPILERS, load_compiler
from echo_trt.backends.tensorrt.session import Session
from echo_trt.bundle.manifest import TensorRTFacts
from echo_trt.errors import UserError
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from super_tree_attention.tensorrt_plugin import WRITTEN


def check_version(engine: str, facts: TensorRTFacts) -> None:
    """Refuse an engine of another version: it runs in the version that built it alone."""
    title, installed = COMPILERS[engine].title, load_compiler(engine).__version__
    if installed != facts.version:
        raise UserError(
            f"the bundle was built by {title} {facts.version}, but {installed} is installed; build it again, or "
            f"install {title} {facts.version}."
        )


def check_card(engine: str, facts: TensorRTFacts, capability: str, name: str) -> None:
    if capability not in facts.capabilities:
        anywhere = COMPILERS[engine].builds_anywhere
        remedy = f"with --compute-capability {capability}, or for another engine" if anywhere else "on this machine"
        raise UserError(
            f"the bundle was built for compute capability {', '.join(facts.capabilities)}, but {name} has "
            f"{capability}; build it again {remedy}."
        )


class TensorRTEngine(DeviceEngine):
    """A compiled network on the session's device, and its KV cache.

    It has room for ``slots`` requests of ``blocks`` KV blocks, or for ``num_blocks`` of all in a paged pool.

    tree  drafted nodes of a request, root included, whose states a head keeps; by default as many as a call's tokens
    """

    def __init__(
        self, session: Session, slots: int, blocks: int, num_blocks: int, graphs: bool = True, tree: int | None = None
    ):
        self._session, self.device = session, session.device
        self._caches = [name for name in session.inputs if "_cache." in name]
        contiguous = f"new_{self._caches[0]}" in session.outputs
        self._aliases = {f"new_{name}" if contiguous else name + WRITTEN: name for name in self._caches}
        heads, rows, head_dim = (session.largest(self._caches[0], axis) for axis in (1, 2, 3))
        self._layout = SlotLayout(slots, blocks, rows - blocks * BLOCK) if contiguous else None
        self.num_blocks, self.sizes = slots * blocks if contiguous else num_blocks, SIZES
        self._limits = CallLimits.of(session, contiguous)
        if slots > self._limits.batch:
            raise UserError(
                f"batch is {slots}, but {session.name} was built for {self._limits.batch} running requests; lower it, "
                "or raise limits.batch in the recipe and build again."
            )
        self.prefill_alone = 0 if contiguous else min(LARGEST, self._limits.tokens)
        self._pool = self._allocate((len(self._caches), slots if contiguous else num_blocks, heads, rows, head_dim))
        self._stream = own_stream(self.device, self) if self.device.type == "cuda" else None
        if self._stream is not None:  # the pool is zeroed on PyTorch's current stream
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._bounds = CallBounds(self._limits.batch, blocks)
        self._sizes = tuple(
            size for size in graph_sizes(self._limits.batch) if size.tokens <= self._limits.tokens and not contiguous
        )
        nodes = self._limits.batch * min(tree or self._limits.tokens, self._limits.tokens)
        sizes = {"features": self.num_blocks * BLOCK, "hidden": nodes}
        self._widths = {name: session.largest(name, 1) for name in sizes if name in session.inputs}
        self._feature_caches = {
            name: DeviceFeatureCache(sizes[name], width, session.types[name], self.device)
            for name, width in self._widths.items()
        }
        self._graphs = Graphs(self._forward, self.device) if graphs and self._stream else None

    @classmethod
    def open(
        cls, engine: str, file: Path, facts: TensorRTFacts, slots: int, blocks: int, num_blocks: int,
        group: RankGroup | None = None, tree: int | None = None, prepare: bool = True,
    ) -> TensorRTEngine:  # fmt: skip
        """Open ``file``, which ``engine``, tensorrt or tensorrt-rtx, built as ``facts`` state.

        With a ``group`` it is a rank of a divided network. Without ``prepare`` a size is captured at its first call.
        """
        check_version(engine, facts)
        device = cuda_device()
        check_card(engine, facts, compute_capability(device), torch.cuda.get_device_name(device))
        session = Session(engine, file, device, group and group.communicator)
        opened = cls(session, slots, blocks, num_blocks, tree=tree)
        if group:
            group.loaded()
        if prepare:
            with launching_kernels():
                opened.capture_all()
        return opened

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Make the contexts and graphs of all padded sizes, so that none is made while requests wait.

        The native graph's calls have other sizes for each slot, whose graphs are captured as calls come.
        """
        if self._graphs is None:
            return
        self._compile_rest()
        if self._layout:
            return
        none = np.zeros(0, np.int64)
        with self._on_stream():
            for size in reversed(self._sizes):
                for arrays, capacity in empty_calls(size, self._bounds, self._session.inputs):
                    self._launch(MicroBatch(*in_words(arrays, capacity), none, none, none, padded=True))
        self._graphs.sealed = True

    def _compile_rest(self) -> None:
        """Run what no graph holds, the move and a draw, whose kernels are compiled at their first launch."""
        row = np.zeros(1, np.int64)
        self.compact_kv(row, row)
        if "logits" in self._session.outputs:
            compile_choice(self._session.width("logits"), self._session.types["logits"], self.device)

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        dtype = self._session.types[self._caches[0]]
        needed = int(np.prod(shape)) * dtype.itemsize
        lower = "limits.batch or limits.context" if self._layout else "limits.kv_blocks"
        if self.device.type == "cuda":
            check_room(self.device, needed, f"the KV cache of {self.num_blocks} blocks", f"lower {lower}")
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _outputs(self, call: ForwardBatch, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
        if self._layout:
            self._clear(call)
            return self._join(call, linear_pieces(call, inputs, self._layout, self._limits))
        return self._join(call, packed_pieces(call, inputs, self._limits, self._sizes, self._bounds))

    @property
    def drafts_levels(self) -> bool:
        """Whether this is a head over a paged pool, which can draft several levels on the device."""
        return self._layout is None and super().drafts_levels

    @property
    def _top_k(self) -> int:
        return self._session.width("scores")

    def _level(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Launch one level, in parts that the profiles hold; returns scores, candidates and states."""
        parts = [self._part_of_level(part) for part in parts_of_level(tensors, self._limits.tokens)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    def _part_of_level(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        mask = tensors["tree_mask"]
        padded = torch.nn.functional.pad(mask, (0, -len(mask) % 4))
        outputs = self._forward(tensors | {"tree_mask": padded.view(torch.int32)}, 0)
        named = dict(zip(self._output_names(), outputs, strict=True))
        return named["scores"], named["candidates"], named["state"]

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Launch on this engine's stream, behind what the current one has and before what it gets afterwards.

        There feature caches are written and outputs are read, and neither stream waits for the other by itself.
        """
        current = torch.cuda.current_stream(self.device) if self._stream is not None else None
        if current is not None:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        if current is not None:
            current.wait_stream(self._stream)

    def _clear(self, call: ForwardBatch) -> None:
        """Zero the slots of new requests: masked rows must be finite, and previous requests may have left others."""
        starting = np.flatnonzero(call.past_lens == 0)
        if len(starting):
            self._pool[:, send(self._layout.slots_of(call)[starting], self.device)] = 0

    def _join(self, call: ForwardBatch, pieces: Iterable[MicroBatch]) -> dict[str, Tensor]:
        """Launch the pieces and put the packed call's outputs together, on the device.

        The outputs of a single piece whose rows are in place are its own, without a copy.
        """
        whole: dict[str, Tensor] = {}
        for piece in pieces:
            outputs = self._launch(piece)
            rows, padded_rows, requested = self._indices(piece)
            for name, output in outputs.items():
                per_row = name in ROW_OUTPUTS
                total = len(call.token_ids if per_row else call.logit_rows)  # packed results have R, too
                target, source = (rows, padded_rows) if per_row else (requested, slice(len(piece.requested)))
                if isinstance(target, slice) and target == slice(0, total):
                    whole[name] = output[source]
                    continue
                if name not in whole:
                    whole[name] = output.new_empty((total, *output.shape[1:]))
                whole[name][target] = output[source]
        return whole

    def _indices(self, piece: MicroBatch) -> list[slice | Tensor]:
        """Return a piece's ``rows``, ``padded_rows`` and ``requested``: slices, or else all of them in one upload."""
        arrays = piece.rows, piece.padded_rows, piece.requested
        if all((np.diff(array) == 1).all() for array in arrays):
            return [slice(int(array[0]), int(array[-1]) + 1) if len(array) else slice(0, 0) for array in arrays]
        return list(send(np.concatenate(arrays), self.device).split([len(array) for array in arrays]))

    def _launch(self, piece: MicroBatch) -> dict[str, Tensor]:
        outputs = None
        if self._graphs and piece.padded and piece.tokens <= LARGEST:
            outputs = self._graphs.run(piece.arrays, piece.capacity, piece.first)
        if outputs is None:
            inputs = Staging(piece.arrays, self.device, piece.capacity).upload(piece.arrays)
            outputs = self._forward(inputs, piece.first, recurs=piece.padded)
        return dict(zip(self._output_names(), outputs, strict=True))

    def _forward(self, tensors: dict[str, Tensor], first: int, recurs: bool = True) -> tuple[Tensor, ...]:
        """Launch over the slots from ``first`` on; the packed results follow the outputs."""
        named = {name: gathered(name, tensor, self._feature_caches) for name, tensor in tensors.items()}
        typed = {name: tensor.to(self._session.types[name]) for name, tensor in named.items()}
        bound = typed | self._bound_caches(first, len(tensors["past_lens"]))
        outputs = self._session.launch(bound, self._aliases, recurs)
        return *outputs.values(), pack_results(outputs)

    def _bound_caches(self, first: int, batch: int) -> dict[str, Tensor]:
        part = slice(first, first + batch) if self._layout else slice(None)
        return {name: cache[part] for name, cache in zip(self._caches, self._pool, strict=True)}

    def _output_names(self) -> Iterator[str]:
        return iter([*(name for name in self._session.outputs if name not in self._aliases), PACKED])

    @torch.inference_mode()
    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        from super_tree_attention.triton_attention import move_rows

        rows = np.stack([self._pool_rows(rows) for rows in (source, target)])
        with self._on_stream():
            move_rows(self._pool, *send(rows, self.device))

    def _pool_rows(self, rows: np.ndarray) -> np.ndarray:
        """Convert pool rows to the rows of move_rows, whose block is a slot's cache here."""
        if self._layout is None:
            return rows
        slot, row = self._layout.slots_and_rows(rows)
        return slot * self._layout.rows + row
