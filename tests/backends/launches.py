"""How many kernels a GPU would launch for what PyTorch computes on a CPU."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that launch nothing: views, and memory without contents.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "lift_fresh", "new_empty", "permute", "select",
    "chunk", "flatten", "resolve_conj", "resolve_neg", "slice", "split", "split_with_sizes", "t", "transpose",
    "unflatten", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
#: Operators that launch nothing where there is nothing to do.
MAY_COPY = {"contiguous", "to", "_to_copy"}


def same_memory(result: Any, arguments: tuple) -> bool:
    """Tell whether an operator that may copy, such as a conversion, had nothing to do."""
    one, other = result, arguments[0] if arguments else None
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.data_ptr() == other.data_ptr() and (one.dtype, one.stride()) == (other.dtype, other.stride())


class Launches(TorchDispatchMode):
    """Count PyTorch's operators, each of which is a launch or more, and the launches of stand-in kernels."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name not in FREE and not (name in MAY_COPY and same_memory(result, args)):
            self.counts[name] += 1
        return result

    def kernels(self, *names: str) -> SimpleNamespace:
        """Return stand-ins that compute nothing for Triton kernels of these names."""

        class StandIn:
            def __init__(kernel, name: str):
                kernel.name = name

            def __getitem__(kernel, grid: Any):
                return lambda *arguments, **options: self.counts.update([kernel.name])

        return SimpleNamespace(**{name: StandIn(name) for name in names})
