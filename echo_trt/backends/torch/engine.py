"""The PyTorch engine: the reference for other engines on a CPU, and Triton's kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.base import METADATA, ROW_OUTPUTS
from echo_trt.backends.cuda.calls import Graphs, Staging
from echo_trt.backends.cuda.device import check_heads, cuda_device, has_cuda, launching_kernels, zeros
from echo_trt.backends.cuda.device_rows import DeviceFeatureCache, compile_choice, gathered
from echo_trt.backends.cuda.engine import DeviceEngine
from echo_trt.backends.cuda.sizes import SIZES, Arrays, CallBounds, capacity_of, empty_call, graph_sizes, pad, size_for
from echo_trt.backends.cuda.transfers import PACKED, pack_results, send
from echo_trt.backends.parallel.rank_group import RankGroup
from echo_trt.backends.states import KeepsStates
from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig
from echo_trt.models.delta_net import COMMIT_OUTPUTS
from echo_trt.models.layers import Config
from echo_trt.models.ranks import Alone, Collectives, among
from echo_trt.models.roles import Role, computed_in
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from super_tree_attention import super_tree_attention

#: Tokens of prompts in a call where nobody decodes, which needs no graph: arithmetic hides its launches. Larger: more
#: memory of activations.
_PROMPT_ALONE = 2048
MAX_REQUESTS = 256  # in one call of an engine that is not told its largest calls


class TorchEngine(KeepsStates, DeviceEngine):
    """A network in eager PyTorch and a KV pool of ``num_blocks`` blocks.

    role         its network is moved to ``device``
    operator     attention; by default the reference on a CPU and the Triton kernel elsewhere
    graphs       whether calls of up to 1,024 tokens are captured as CUDA graphs
    collectives  exchange with the other ranks of a divided network; by default the rank is alone
    bounds       the largest calls: with them all graphs are captured at once, else each at the first call of its size
    resident     whether outputs stay on the device until they are read, and heads' inputs too; by default on a GPU
    """

    def __init__(
        self,
        role: Role,
        num_blocks: int,
        device: str = "cpu",
        operator: Callable[..., Tensor] | None = None,
        graphs: bool = True,
        collectives: Collectives | None = None,
        bounds: CallBounds | None = None,
        resident: bool | None = None,
    ):
        self.num_blocks, self.sizes = num_blocks, SIZES if device == "cuda" else ()
        self.prefill_alone = _PROMPT_ALONE if self.sizes else 0
        self.device = cuda_device() if device == "cuda" else torch.device(device)
        config = role.network.config
        self._role = role.to(self.device)
        self._dtype = computed_in(role.network)
        self._collectives = collectives or Alone()
        self._operator = operator or _operator_for(self.device, config)
        states = getattr(role, "states", {})
        if states and self.device.type != "cpu":
            raise UserError(
                "this network has recurrent layers, which run on a CPU alone so far; build with --engine cpu."
            )
        self._open_states(states, bounds.requests if bounds else MAX_REQUESTS)
        shape = 2 * role.num_layers, num_blocks, config.num_kv_heads, BLOCK, config.head_dim
        self._pool = zeros(shape, self._dtype, self.device, f"the KV cache of {num_blocks} blocks")
        self._resident = self.device.type != "cpu" if resident is None else resident
        self._bounds = bounds or CallBounds(MAX_REQUESTS, num_blocks, table=num_blocks)
        self._feature_caches = self._make_feature_caches() if self._resident else {}
        self._graph_sizes = graph_sizes(self._bounds.requests, self._bounds.tree)
        self._graphs = Graphs(self._forward, self.device) if graphs and self.device.type == "cuda" else None
        if self._graphs and bounds:
            self._capture_all()

    def _make_feature_caches(self) -> dict[str, DeviceFeatureCache]:
        """Make a head's feature caches: features by pool row, and states of nodes that are drafted in one iteration.

        Of features their projection to a hidden state is kept, which has a third of their size or less.
        """
        network, inputs = self._role.network, self._role.inputs
        config, caches = network.config, {}
        if isinstance(config, DecoderConfig):
            return {}
        kind = self._dtype, self.device
        if "features" in inputs:
            size = self.num_blocks * BLOCK, config.hidden_size
            caches["features"] = DeviceFeatureCache(*size, *kind, network.combine)
        nodes = self._bounds.requests * (self._bounds.tree + 1)
        if self._bounds.table:  # each node has a KV row; padded requests have nodes without one
            nodes = min(nodes, self._bounds.table * BLOCK)
        if "hidden" in inputs:
            caches["hidden"] = DeviceFeatureCache(nodes, config.hidden_size, *kind)
        return caches

    @torch.inference_mode()
    def _capture_all(self) -> None:
        """Capture every size, so that no graph is captured while requests wait."""
        for size in reversed(self._graph_sizes):  # the largest first: the smaller ones find its memory
            self._graphs.run(*empty_call(size, self._bounds, self._role.inputs))
        self._graphs.sealed = True
        self._compile_rest()

    def _compile_rest(self) -> None:
        """Run what no graph holds, the move and a draw: a kernel's first launch compiles it, for a second or more."""
        row = np.zeros(1, np.int64)
        self.compact_kv(row, row)
        if "logits" in self._role.outputs:
            compile_choice(self._role.network.config.vocab_size, self._dtype, self.device)

    def overlap(self, work: Callable[[], None]) -> bool:
        return self._resident and super().overlap(work)

    @torch.inference_mode()
    def launch(self, call: ForwardBatch, **inputs: Any) -> dict[str, np.ndarray]:
        if self._resident:
            return super().launch(call, **inputs)
        if self.states:
            inputs |= {"parents": self.states.begin(call)} | self.states.inputs
        arrays = self._arrays_of(call, inputs)
        outputs = self._forward({name: torch.from_numpy(array) for name, array in arrays.items()})
        on_host = ((each.float() if each.is_floating_point() else each).numpy() for each in outputs)
        named = dict(zip(self._role.outputs, on_host, strict=True))
        if self.states:
            self.states.keep(*(named[name] for name in COMMIT_OUTPUTS))
        return named

    def _arrays_of(self, call: ForwardBatch, inputs: dict[str, np.ndarray]) -> Arrays:
        arrays = {"token_ids": call.token_ids, "positions": call.positions, **inputs}
        arrays = {name: arrays[name] for name in self._role.inputs}
        return arrays | {name: getattr(call, name) for name in (*METADATA, "logit_rows")}

    def _forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute the role's outputs; if they stay on the device, the packed results follow."""
        outputs = self._compute(tensors)
        if self._resident:
            return *outputs, pack_results(dict(zip(self._role.outputs, outputs, strict=True)))
        return outputs

    def _compute(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        named = {name: gathered(name, tensors[name], self._feature_caches) for name in self._role.inputs}
        if "features" in self._feature_caches and tensors["features"].ndim == 1:
            named["combined"] = named.pop("features")
        own = self.states.inputs if self.states else ()  # float32, as recurrent layers compute
        narrow = {name for name, tensor in named.items() if tensor.is_floating_point()}.difference(own)
        named |= {name: named[name].to(self._dtype) for name in narrow}
        metadata = [tensors[name] for name in METADATA]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Rotation is in float32, so query and key are converted back to the network's type.
            query, key = query.to(value.dtype), key.to(value.dtype)
            pools = self._pool[2 * layer], self._pool[2 * layer + 1]
            window = self._role.network.config.window_of(layer)
            return self._operator(query, key, value, *pools, *metadata, sliding_window=window)

        with among(self._collectives):
            outputs: tuple[Tensor, ...] = self._role(named, tensors["logit_rows"], attend)
        return outputs

    def _level(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self._compute(tensors)

    @property
    def _top_k(self) -> int:
        return self._role.top_k

    def _outputs(self, call: ForwardBatch, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
        outputs = dict(zip((*self._role.outputs, PACKED), self._launch(self._arrays_of(call, inputs)), strict=True))
        requested, tokens = len(call.logit_rows), len(call.token_ids)
        return {name: output[: tokens if name in ROW_OUTPUTS else requested] for name, output in outputs.items()}

    def _launch(self, arrays: Arrays) -> tuple[Tensor, ...]:
        """Replay a graph, or launch; rows of padding follow those of the call."""
        size = size_for(arrays, self._graph_sizes) if self._graphs else None
        outputs = None
        if self._graphs and size:
            outputs = self._graphs.run(pad(arrays, size), capacity_of(size, self._bounds))
        if outputs is None:
            outputs = self._forward(Staging(arrays, self.device).upload(arrays))
        return outputs

    def kv_block(self, index: int) -> Sequence[np.ndarray]:
        if self.device.type != "cpu":
            return ()
        bits: np.ndarray = self._pool[:, index].view(torch.uint8).numpy()  # numpy has no bfloat16
        return (bits,)

    @torch.inference_mode()
    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        old, new = send(np.stack((source, target)).astype(np.int64), self.device)
        if self.device.type == "cpu":
            self._pool[:, new // BLOCK, :, new % BLOCK] = self._pool[:, old // BLOCK, :, old % BLOCK]
        else:
            from super_tree_attention.triton_attention import move_rows

            move_rows(self._pool, old, new)


def _operator_for(device: torch.device, config: Config) -> Callable[..., Tensor]:
    if device.type == "cpu":
        return super_tree_attention
    check_heads(config.head_dim, config.num_heads // config.num_kv_heads)
    try:
        from super_tree_attention.triton_attention import super_tree_attention_triton
    except ImportError as error:
        raise UserError(
            f"the kernel for GPUs cannot be loaded ({error}); run pip install -e '.[cuda]' in the repository, or "
            "echo-trt build the bundle with --engine cpu."
        ) from error
    return super_tree_attention_triton


def open_torch(
    file: Path, num_blocks: int, bounds: CallBounds | None = None, group: RankGroup | None = None
) -> TorchEngine:
    """Open a bundle's network in PyTorch, on the GPU where there is one; with a ``group`` as a rank of it."""
    from echo_trt.backends.torch.files import load_role

    device = "cuda" if has_cuda() else "cpu"
    # Weights go to this rank's own card: safetensors takes "cuda" for the first one, whichever is current.
    role = load_role(file, str(cuda_device()) if device == "cuda" else device)
    if group:
        group.loaded()
    with launching_kernels():
        return TorchEngine(role, num_blocks, device, collectives=group and group.collectives, bounds=bounds)
