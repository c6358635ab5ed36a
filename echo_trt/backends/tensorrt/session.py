"""A compiled TensorRT engine on the device: its sizes, its contexts, its launch."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_trt.backends.cuda.device import check_room
from echo_trt.backends.tensorrt.library import first_sentence, load_tensorrt, logger_of
from echo_trt.errors import UserError

Dims = tuple[int, ...]
TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16,
    "INT32": torch.int32, "INT64": torch.int64, "UINT8": torch.uint8,
}  # fmt: skip


def profile_for(profiles: list[Mapping[str, tuple[Dims, Dims]]], shapes: Mapping[str, Dims]) -> int:
    """Return the first profile, of least and largest shapes by input, that covers ``shapes``."""
    for index, profile in enumerate(profiles):
        within = (
            low <= size <= high
            for name, (minimum, maximum) in profile.items()
            for low, size, high in zip(minimum, shapes[name], maximum, strict=True)
        )
        if all(within):
            return index
    raise ValueError(f"no optimisation profile takes {dict(shapes)}; there are {profiles}")


class Session:
    """A deserialised engine, with a context for every size of call that recurs and one scratch buffer.

    Kernels are never exchanged while running: the same call gives the same bits from the first time on.
    ``communicator``: NCCL's (a PyCapsule), over which a rank of a divided network reaches the other ranks.
    """

    def __init__(self, file: Path, device: torch.device, communicator: Any = None):
        self._api = load_tensorrt()
        self._communicator = communicator
        self.device, self.name, self._logger = device, file.name, logger_of(self._api)
        self._runtime = self._api.Runtime(self._logger)
        remedy = "use a smaller target, or one GPU for this alone"
        check_room(device, file.stat().st_size, f"engine {file.name}", remedy)
        self._logger.forget()
        # Mapped, not read: eight ranks that start together would hold copies of their files beside the cached pages.
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise UserError(
                f"TensorRT cannot load {file}: {first_sentence(self._logger.errors())}; build the bundle again."
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = self._api.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == inputs]
        self.outputs = [name for name in names if self._engine.get_tensor_mode(name) != inputs]
        kinds = self._api.DataType
        types = {getattr(kinds, name): dtype for name, dtype in TYPES.items()}
        self.types = {name: types[self._engine.get_tensor_dtype(name)] for name in names}
        self.num_profiles, shapes = self._engine.num_optimization_profiles, self._engine.get_tensor_profile_shape
        self._profiles = [
            {name: (tuple(shapes(name, i)[0]), tuple(shapes(name, i)[2])) for name in self.inputs}
            for i in range(self.num_profiles)
        ]
        scratch = self._engine.device_memory_size_v2
        check_room(device, scratch, f"the scratch memory of {file.name}", "lower limits.batch or limits.prefill_chunk")
        self._scratch = torch.empty(max(scratch, 1), dtype=torch.uint8, device=device)
        self._settings = self._engine.create_runtime_config()
        by_user = self._api.ExecutionContextAllocationStrategy.USER_MANAGED
        self._settings.set_execution_context_allocation_strategy(by_user)
        self._contexts: dict[Any, Any] = {}
        self._in_graphs: dict[int, Any] = {}  # contexts of captured graphs, by their identity

    def largest(self, name: str, axis: int, profile: int = 0) -> int:
        return self._profiles[profile][name][1][axis]

    def width(self, output: str) -> int:
        return self._engine.get_tensor_shape(output)[-1]

    def launch(
        self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], recurs: bool = True
    ) -> dict[str, Tensor]:
        """Enqueue one call on PyTorch's current stream; the outputs are new tensors, except those in ``aliases``.

        ``aliases``: output name -> input that it overwrites. ``recurs``: whether the call has a padded size.
        """
        context = self._context({name: tuple(tensors[name].shape) for name in self.inputs}, recurs)
        for name in self.inputs:
            # An empty tensor has no address, and the engine reads nothing from any.
            self._must(context.set_tensor_address(name, tensors[name].data_ptr() or self._scratch.data_ptr()), name)
        outputs = {}
        for name in self.outputs:
            if name in aliases:
                address = tensors[aliases[name]].data_ptr()
            else:
                shape = tuple(context.get_tensor_shape(name))
                outputs[name] = torch.empty(shape, dtype=self.types[name], device=self.device)
                address = outputs[name].data_ptr()
            self._must(context.set_tensor_address(name, address or self._scratch.data_ptr()), name)
        self._must(context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream), "the launch")
        return outputs

    def _context(self, shapes: dict[str, Dims], recurs: bool = True) -> Any:
        """Return a context of these shapes: of a size that ``recurs`` one that no CUDA graph was captured with before.

        TensorRT does not promise that a context serves two graphs, or a graph and launches. Calls that do not recur
        share one context a profile, whose shapes are set each time.
        """
        key: Any = tuple(shapes.values())
        if recurs and key in self._contexts:
            context = self._contexts[key]
            capturing = torch.cuda.is_current_stream_capturing()
            if capturing:
                self._in_graphs[id(context)] = context
            if capturing or id(context) not in self._in_graphs:
                return context
        profile = profile_for(self._profiles, shapes)
        key = key if recurs else profile
        context = None if recurs else self._contexts.get(key)
        new = context is None
        context = self._new_context(profile) if new else context
        for name, shape in shapes.items():
            self._must(context.set_input_shape(name, shape), name)
        if new:
            torch.cuda.current_stream(self.device).synchronize()
            self._contexts[key] = context
        return context

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._settings)
        self._must(context is not None, "a context")
        if self._communicator is not None:  # waits until every rank is here; all ranks make the same calls
            self._must(context.set_communicator(self._communicator), "the communicator")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._must(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
        return context

    def _must(self, succeeded: bool, subject: str) -> None:
        if not succeeded:
            raise RuntimeError(f"TensorRT refused {subject}: {first_sentence(self._logger.errors())}")
