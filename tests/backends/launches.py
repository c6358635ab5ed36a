"""How many kernels a GPU would launch for what PyTorch computes on a CPU."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that launch nothing: views, and memory without contents.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "lift_fresh", "new_empty", "permute", "select",
    "slice", "split", "split_with_sizes", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


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
        if name not in FREE and not (name == "_to_copy" and result is args[0]):
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
