"""The collectives of a divided network: NCCL with a GPU a rank, or gloo without GPUs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from echo_trt.backends.cuda.device import has_cuda
from echo_trt.errors import UserError
from echo_trt.models.ranks import Collectives

HOST = "127.0.0.1"  # the ranks are processes of one machine


@dataclass(frozen=True)
class RankGroup:
    """One rank among ``ranks``.

    communicator  NCCL's, in TensorRT's form; None without GPUs
    abort         ends a collective that waits for a lost rank
    leave         leaves the group
    loaded        waits until all ranks have loaded their weights; to be called before an engine's first collective,
                  which would count the time that the slowest rank still reads against its timeout
    """

    rank: int
    ranks: int
    collectives: Collectives
    communicator: Any = None
    abort: Callable[[], None] = lambda: None
    leave: Callable[[], None] = lambda: None
    loaded: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class ByNccl:
    group: dist.ProcessGroup

    def all_reduce(self, part: Tensor, ranks: int) -> Tensor:
        self.group.allreduce([part]).wait()
        return part

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        gathered = part.new_empty((ranks * part.shape[0], *part.shape[1:]))
        self.group._allgather_base(gathered, part.contiguous()).wait()
        return gathered


@dataclass(frozen=True)
class ByGloo:
    group: dist.ProcessGroupGloo

    def all_reduce(self, part: Tensor, ranks: int) -> Tensor:
        # Added in the order of the ranks, so that a token's bits do not depend on its row in a call.
        return reduce(torch.add, self._all(part, ranks))

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        return torch.cat(self._all(part, ranks))

    def _all(self, part: Tensor, ranks: int) -> list[Tensor]:
        if not part.numel():
            return [part.clone() for _ in range(ranks)]
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks)]
        self.group.allgather([parts], [part.contiguous()]).wait()
        return parts


def check_gpus(ranks: int) -> None:
    """Refuse fewer GPUs than ranks; without any the ranks are on the CPU."""
    count = torch.cuda.device_count() if has_cuda() else ranks
    if count < ranks:
        raise UserError(
            f"tensor_parallel is {ranks}, but PyTorch sees {count} GPU{'s' * (count > 1)} here; run on a machine with "
            f"{ranks}, or set tensor_parallel to {1 << count.bit_length() - 1} and build again."
        )


def join(store: dist.Store, rank: int, ranks: int, patience: float, loaded: Callable[[], None]) -> RankGroup:
    """Meet the other ranks at ``store``; ``loaded``: the group's.

    A collective fails after twice ``patience`` seconds, after which rank 0 gives a call up: NCCL's watchdog ends a
    process, which must have told the reason by then.
    """
    group = (_join_nccl if has_cuda() else join_gloo)(store, rank, ranks, timedelta(seconds=2 * patience))
    return replace(group, loaded=loaded)


def _join_nccl(store: dist.Store, rank: int, ranks: int, longest: timedelta) -> RankGroup:
    if dist.is_initialized():
        raise UserError("another divided network is open in this process; close it first, or use another process.")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    # With a device NCCL connects at once, and not in the middle of the first call.
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, timeout=longest, device_id=device)
    group = dist.group.WORLD
    communicator = _capsule(group._get_backend(device)._comm_ptr())
    return RankGroup(rank, ranks, ByNccl(group), communicator, group.abort, dist.destroy_process_group)


def join_gloo(store: dist.Store, rank: int, ranks: int, longest: timedelta) -> RankGroup:
    torch.set_num_threads(min(torch.get_num_threads(), max((os.cpu_count() or 1) // ranks, 1)))  # they share the cores
    options = dist.ProcessGroupGloo._Options()
    options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname=HOST)], longest
    return RankGroup(rank, ranks, ByGloo(dist.ProcessGroupGloo(store, rank, ranks, options)))


def _capsule(pointer: int) -> Any:
    """Wrap a C pointer for TensorRT's Python bindings."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(pointer, None, None)
