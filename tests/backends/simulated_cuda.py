"""A CUDA device simulated on a CPU: it finds what a card would punish, and names it.

Tensors of the device say that they are on cuda:0. A capture records operators and computes them too; a replay computes
the record again, on the memory that it was captured with, and spoils its own scratch memory afterwards. Faults are
operators over tensors of host and device, waits and copies from the host in a capture, replays over memory that was
freed, and pinned memory that changes before the copy from it must have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugins.interpreted import interpreted
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import super_tree_attention as package
from super_tree_attention import super_tree_attention, triton_attention

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class DeviceTensor(Tensor):
    """A tensor of the device, whose values ``host`` has."""

    host: Tensor
    device_of: SimulatedCuda  # of the test that runs

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        facts = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made = Tensor._make_wrapper_subclass(cls, host.shape, **facts, device="cuda:0")
        made.host = host
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({self.host})"

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls.device_of.run(function, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Take what PyTorch does not dispatch without a card: indexing and copies."""
        name = getattr(function, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            with _disable_current_modes():
                return cls.device_of.run(function, args, kwargs or {}, name)
        if name == "copy_":
            return cls.device_of.run(torch.ops.aten.copy_.default, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def host_of(value: Any) -> Any:
    return value.host if isinstance(value, DeviceTensor) else value


def tensors_of(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Borrowed:
    """A tensor whose memory is another's: a graph does not keep it alive."""

    def __init__(self, tensor: Tensor):
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._type, self._place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def get(self) -> Tensor:
        memory = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        if memory is None:
            raise MemoryError
        return torch.empty(0, dtype=self._type).set_(memory, *self._place)


class SimulatedGraph:
    """What stands for a CUDA graph: operators, and the memory that they made in the capture."""

    device: SimulatedCuda  # of the test that runs

    def __init__(self) -> None:
        self._steps: list[tuple] = []
        self._scratch: dict[int, Tensor] = {}

    def add(self, function: Callable, args: Any, kwargs: Any, output: Any) -> None:
        known = {memory_of(tensor) for tensor in tensors_of(args, kwargs)}
        made = {i: t for i, t in enumerate(tensors_of(output)) if t.numel() and memory_of(t) not in known}

        def kept(value: Any) -> Any:
            others = isinstance(value, Tensor) and value.numel() and memory_of(value) not in self._scratch
            return Borrowed(value) if others else value

        self._steps.append((function, *tree_map(kept, (args, kwargs)), made))
        self._scratch |= {memory_of(tensor): tensor for tensor in made.values()}

    def replay(self) -> None:
        self.device.replays += 1
        for function, args, kwargs, made in self._steps:
            try:
                args, kwargs = tree_map(lambda v: v.get() if isinstance(v, Borrowed) else v, (args, kwargs))
            except MemoryError:
                return self.device.fault(f"a graph's {function} uses memory that was freed")
            found = tensors_of(function(*args, **kwargs))
            for index, tensor in made.items():
                tensor.copy_(found[index])
        for tensor in self._scratch.values():  # another graph of the pool may write there
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


class SimulatedEvent:
    """``upto``: copies of the device, in order, that have run when the event is waited for."""

    device: SimulatedCuda
    upto = 0

    def record(self) -> None:
        self.upto = self.device.copies

    def synchronize(self) -> None:
        self.device.waited(self.upto)


class SimulatedCuda(TorchDispatchMode):
    """The device, while it is entered.

    faults   what a card would punish
    copies   from the host so far
    replays  of graphs
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.faults: list[str] = []
        self.copies = self.replays = 0
        self._graph: SimulatedGraph | None = None  # that is captured
        self._pinned: set[int] = set()
        self._underway: list[tuple[int, Tensor, Tensor]] = []  # number of a copy, its source, and what was copied
        for kind in (DeviceTensor, SimulatedGraph, SimulatedEvent):
            monkeypatch.setattr(kind, "device_of" if kind is DeviceTensor else "device", self, raising=False)
        self._patch(monkeypatch)

    def fault(self, text: str) -> None:
        self.faults.append(text + " in a capture" * (self._graph is not None))

    def waited(self, upto: int | None = None) -> None:
        """Note that the host has waited for the first ``upto`` copies, by default for everything."""
        if upto is None and self._graph is not None:
            self.fault("the host waits")
        for number, source, copied in [*self._underway]:
            if upto is None or number < upto:
                self._underway.remove((number, source, copied))
                if not torch.equal(source, copied):
                    self.fault("pinned memory changed before its copy had run")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function: Callable, args: tuple, kwargs: dict[str, Any], name: str = "") -> Any:
        """Compute an operator where its tensors are."""
        name = name or function.overloadpacket.__name__
        if name in ("to", "cpu", "cuda"):  # of which inference mode tells before they are taken apart
            return self._to(function, args, kwargs)
        tensors, device = tensors_of(args, kwargs), kwargs.get("device")
        on_device = device is not None and torch.device(device).type == "cuda"
        there = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        known = {id(tensor.host): tensor for tensor in there}
        inner_args, inner = tree_map(host_of, (args, kwargs))
        if on_device:
            inner["device"] = "cpu"
        pinned = inner.pop("pin_memory", False)
        if name in ("copy_", "_to_copy"):
            self._note_copy(name, args, kwargs, on_device)
        elif there:
            self._check(name, tensors)
        out = function(*inner_args, **inner)
        if pinned:
            self._pinned.add(memory_of(out))
        if self._graph is not None and (there or on_device):
            self._graph.add(function, inner_args, inner, out)
        back = (device is not None and not on_device) or (name == "copy_" and not isinstance(args[0], DeviceTensor))
        if back or not (there or on_device):
            return out

        def wrapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return known[id(value)] if id(value) in known else DeviceTensor(value)
            return value

        return tree_map(wrapped, out)

    def _to(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Convert a tensor's type or device, by ``_to_copy`` where either is another one."""
        tensor, *rest = args
        wanted = {"device": tensor.device, "dtype": tensor.dtype} | kwargs
        for value in rest:
            if isinstance(value, torch.dtype):
                wanted["dtype"] = value
            elif isinstance(value, Tensor):
                wanted |= {"device": value.device, "dtype": value.dtype}
            elif isinstance(value, str | torch.device):
                wanted["device"] = value
        device = torch.device(wanted["device"])
        if function.overloadpacket.__name__ == "cpu":
            device = torch.device("cpu")
        if (device.type, wanted["dtype"]) == (tensor.device.type, tensor.dtype):
            return tensor
        wanted = {"device": device, "dtype": wanted["dtype"], "non_blocking": wanted.get("non_blocking", False)}
        return self.run(torch.ops.aten._to_copy.default, (tensor,), wanted)

    def _note_copy(self, name: str, args: tuple, kwargs: dict[str, Any], on_device: bool) -> None:
        source = args[1] if name == "copy_" else args[0]
        if name == "copy_":
            on_device = isinstance(args[0], DeviceTensor)
        elif "device" not in kwargs:
            on_device = isinstance(source, DeviceTensor)
        if isinstance(source, DeviceTensor):
            if not on_device:
                self.waited()
        elif on_device and source.numel():
            if self._graph is not None:
                self.fault(f"{source.numel()} values are copied from the host")
            if kwargs.get("non_blocking") and memory_of(source) in self._pinned:
                self._underway.append((self.copies, source.detach(), source.detach().clone()))
            self.copies += 1

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        """Note host tensors beside the device's, and operators that wait for values."""
        if any(tensor.dim() and not isinstance(tensor, DeviceTensor) for tensor in tensors):
            self.fault(f"{name} takes tensors of host and device")
        indexed = name in ("index", "__getitem__", "__setitem__")
        if name in WAITS or (indexed and any(t.dtype == torch.bool and t.dim() for t in tensors[1:])):
            self.waited()

    def kernel(self, function: Callable) -> Callable:
        """Return ``function`` of host tensors as a kernel of the device."""

        def launch(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return self.run(function, args, kwargs, getattr(function, "__name__", "a kernel"))

        return launch

    def kernels(self, module: Any, *names: str) -> SimpleNamespace:
        """Return the interpreted Triton kernels ``names`` of ``module`` as kernels of the device."""

        class Launched:
            def __init__(kernel, name: str):
                kernel.name = name

            def __getitem__(kernel, grid: tuple) -> Callable:
                def compute(*args: Any, **options: Any) -> None:
                    getattr(module, kernel.name)[grid](*args, **options)

                return self.kernel(compute)

        return SimpleNamespace(**{name: Launched(name) for name in names})

    def attention(self, *args: Any, sliding_window: int = 0) -> Tensor:
        """Compute the reference; rows without a request stay unwritten, as the kernel leaves them."""

        def attention(*args: Any) -> Tensor:
            out, count = torch.full_like(args[0], float("nan")), int(args[6][-1])
            if count:
                out[:count] = super_tree_attention(*args, sliding_window=sliding_window)[:count]
            return out

        return self.kernel(attention)(*args)

    @contextmanager
    def _capture(self, graph: SimulatedGraph, **options: Any) -> Iterator[None]:
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned.add(memory_of(pinned))
        return pinned

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=self.waited, query=lambda: False)
        facts = SimpleNamespace(multi_processor_count=132, major=9, minor=0, total_memory=80 << 30)
        answers = {
            "is_available": True, "init": None, "_lazy_init": None, "current_device": 0, "device_count": 1,
            "get_device_capability": (9, 0), "get_device_name": "a simulated H100", "get_device_properties": facts,
            "mem_get_info": (70 << 30, 80 << 30), "memory_reserved": 0, "memory_allocated": 0, "empty_cache": None,
            "current_stream": stream, "stream": nullcontext(), "graph_pool_handle": None,
        }  # fmt: skip
        for name, value in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.waited())
        for name, kind in {"Event": SimulatedEvent, "CUDAGraph": SimulatedGraph, "graph": self._capture}.items():
            monkeypatch.setattr(torch.cuda, name, kind)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr("echo_trt.backends.cuda.calls.own_stream", lambda device, owner: stream)
        monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        names = "sample", "add_at", "penalise"
        sampling = self.kernels(interpreted("super_tree_attention.sampling_kernels"), *names)
        monkeypatch.setattr(package, "sampling_kernels", sampling, raising=False)
        moving = self.kernels(interpreted("super_tree_attention.kernel"), "copy_rows")
        monkeypatch.setattr(triton_attention, "_kernels", lambda device: moving)
