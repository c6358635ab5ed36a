"""The engine for TensorRT: packed calls over a paged pool, caches and large outputs on the device, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.base import ROW_OUTPUTS
from echo_trt.backends.cuda.calls import Graphs, Staging
from echo_trt.backends.cuda.device import compute_capability, cuda_device, launching_kernels, own_stream, zeros
from echo_trt.backends.cuda.device_rows import DeviceFeatureCache, compile_choice, gathered
from echo_trt.backends.cuda.engine import DeviceEngine
from echo_trt.backends.cuda.levels import parts_of_level
from echo_trt.backends.cuda.sizes import LARGEST, SIZES, CallBounds, empty_call, graph_sizes
from echo_trt.backends.cuda.transfers import PACKED, pack_results, send
from echo_trt.backends.parallel.rank_group import RankGroup
from echo_trt.backends.tensorrt.calls import MicroBatch, in_words, packed_pieces
from echo_trt.backends.tensorrt.library import TensorRTFacts, load_tensorrt
from echo_trt.backends.tensorrt.session import Session
from echo_trt.errors import UserError
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from super_tree_attention.tensorrt_plugin import WRITTEN


def check_version(facts: TensorRTFacts) -> None:
    """Refuse an engine of another version: it runs in the version that built it alone."""
    installed = load_tensorrt().__version__
    if installed != facts.version:
        raise UserError(
            f"the bundle was built by TensorRT {facts.version}, but {installed} is installed; build it again, or "
            f"install TensorRT {facts.version}."
        )


def check_card(facts: TensorRTFacts, capability: str, name: str) -> None:
    if capability not in facts.capabilities:
        raise UserError(
            f"the bundle was built for compute capability {', '.join(facts.capabilities)}, but {name} has "
            f"{capability}; build it again on this machine."
        )


class TensorRTEngine(DeviceEngine):
    """A compiled network on the session's device, and its KV cache.

    Its pool has ``num_blocks`` KV blocks, of ``slots`` requests of at most ``blocks`` each.

    tree  drafted nodes of a request, root included, whose states a head keeps; by default as many as a call's tokens
    """

    def __init__(
        self, session: Session, slots: int, blocks: int, num_blocks: int, graphs: bool = True, tree: int | None = None
    ):
        self._session, self.device = session, session.device
        self._caches = [name for name in session.inputs if "_cache." in name]
        self._aliases = {name + WRITTEN: name for name in self._caches}
        self.num_blocks, self.sizes = num_blocks, SIZES
        usual = session.num_profiles - 1
        batch, self._tokens = session.largest("past_lens", 0, usual), session.largest("token_ids", 0, usual)
        if slots > batch:
            raise UserError(
                f"batch is {slots}, but {session.name} was built for {batch} running requests; lower it, or raise "
                "limits.batch in the recipe and build again."
            )
        self.prefill_alone = min(LARGEST, self._tokens)
        block = (session.largest(self._caches[0], axis) for axis in (1, 2, 3))
        shape, dtype = (len(self._caches), num_blocks, *block), session.types[self._caches[0]]
        self._pool = zeros(shape, dtype, self.device, f"the KV cache of {num_blocks} blocks")
        self._stream = own_stream(self.device, self) if self.device.type == "cuda" else None
        if self._stream is not None:  # the pool is zeroed on PyTorch's current stream
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._bounds = CallBounds(batch, blocks)
        self._sizes = tuple(size for size in graph_sizes(batch) if size.tokens <= self._tokens)
        nodes = batch * min(tree or self._tokens, self._tokens)
        sizes = {"features": self.num_blocks * BLOCK, "hidden": nodes}
        self._widths = {name: session.largest(name, 1) for name in sizes if name in session.inputs}
        self._feature_caches = {
            name: DeviceFeatureCache(sizes[name], width, session.types[name], self.device)
            for name, width in self._widths.items()
        }
        self._graphs = Graphs(self._forward, self.device) if graphs and self._stream else None

    @classmethod
    def open(
        cls, file: Path, facts: TensorRTFacts, slots: int, blocks: int, num_blocks: int,
        group: RankGroup | None = None, tree: int | None = None, prepare: bool = True,
    ) -> TensorRTEngine:  # fmt: skip
        """Open ``file``, which was built as ``facts`` state.

        With a ``group`` it is a rank of a divided network. Without ``prepare`` a size is captured at its first call.
        """
        check_version(facts)
        device = cuda_device()
        check_card(facts, compute_capability(device), torch.cuda.get_device_name(device))
        session = Session(file, device, group and group.communicator)
        opened = cls(session, slots, blocks, num_blocks, tree=tree)
        if group:
            group.loaded()
        if prepare:
            with launching_kernels():
                opened.capture_all()
        return opened

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Make the contexts and graphs of all padded sizes, so that none is made while requests wait."""
        if self._graphs is None:
            return
        self._compile_rest()
        none = np.zeros(0, np.int64)
        with self._on_stream():
            for size in reversed(self._sizes):
                arrays, capacity = empty_call(size, self._bounds, self._session.inputs)
                self._launch(MicroBatch(*in_words(arrays, capacity), 0, 0, none, padded=True))
        self._graphs.sealed = True

    def _compile_rest(self) -> None:
        """Run what no graph holds, the move and a draw, whose kernels are compiled at their first launch."""
        row = np.zeros(1, np.int64)
        self.compact_kv(row, row)
        if "logits" in self._session.outputs:
            compile_choice(self._session.width("logits"), self._session.types["logits"], self.device)

    def _outputs(self, call: ForwardBatch, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return self._join(call, packed_pieces(call, inputs, self._tokens, self._sizes, self._bounds))

    @property
    def _top_k(self) -> int:
        return self._session.width("scores")

    def _level(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Launch one level, in parts that the profiles hold; returns scores, candidates and states."""
        parts = [self._part_of_level(part) for part in parts_of_level(tensors, self._tokens)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    def _part_of_level(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        mask = tensors["tree_mask"]
        padded = torch.nn.functional.pad(mask, (0, -len(mask) % 4))
        outputs = self._forward(tensors | {"tree_mask": padded.view(torch.int32)})
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

    def _join(self, call: ForwardBatch, pieces: Iterable[MicroBatch]) -> dict[str, Tensor]:
        """Launch the pieces and put the packed call's outputs together, on the device.

        The outputs of a single piece whose rows are in place are its own, without a copy.
        """
        whole: dict[str, Tensor] = {}
        for piece in pieces:
            outputs = self._launch(piece)
            for name, output in outputs.items():
                per_row = name in ROW_OUTPUTS
                total = len(call.token_ids if per_row else call.logit_rows)  # packed results have R, too
                target = slice(piece.begin, piece.begin + piece.count) if per_row else self._requested(piece)
                source = slice(piece.count if per_row else len(piece.requested))
                if isinstance(target, slice) and target == slice(0, total):
                    whole[name] = output[source]
                    continue
                if name not in whole:
                    whole[name] = output.new_empty((total, *output.shape[1:]))
                whole[name][target] = output[source]
        return whole

    def _requested(self, piece: MicroBatch) -> slice | Tensor:
        """Return a piece's ``requested`` as a slice, or else as a tensor on the device."""
        rows = piece.requested
        if (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        return send(rows, self.device)

    def _launch(self, piece: MicroBatch) -> dict[str, Tensor]:
        outputs = None
        if self._graphs and piece.padded and piece.tokens <= LARGEST:
            outputs = self._graphs.run(piece.arrays, piece.capacity)
        if outputs is None:
            inputs = Staging(piece.arrays, self.device, piece.capacity).upload(piece.arrays)
            outputs = self._forward(inputs, recurs=piece.padded)
        return dict(zip(self._output_names(), outputs, strict=True))

    def _forward(self, tensors: dict[str, Tensor], recurs: bool = True) -> tuple[Tensor, ...]:
        """Launch once; the packed results follow the outputs."""
        named = {name: gathered(name, tensor, self._feature_caches) for name, tensor in tensors.items()}
        typed = {name: tensor.to(self._session.types[name]) for name, tensor in named.items()}
        caches = dict(zip(self._caches, self._pool, strict=True))
        outputs = self._session.launch(typed | caches, self._aliases, recurs)
        return *outputs.values(), pack_results(outputs)

    def _output_names(self) -> Iterator[str]:
        return iter([*(name for name in self._session.outputs if name not in self._aliases), PACKED])

    @torch.inference_mode()
    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        from super_tree_attention.triton_attention import move_rows

        with self._on_stream():
            move_rows(self._pool, *send(np.stack((source, target)), self.device))
