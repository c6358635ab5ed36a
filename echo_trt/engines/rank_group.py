"""How the ranks of a divided network add up: over NCCL with a GPU a rank, or over gloo where there is no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from echo_trt.engines.cuda_device import has_cuda
from echo_trt.errors import UserError
from echo_trt.models.ranks import AllReduce

HOST = "127.0.0.1"  # the ranks are processes of one machine


@dataclass(frozen=True)
class RankGroup:
    """One rank among ``ranks``. ``communicator``: NCCL's, as TensorRT takes it; None without GPUs.

    ``abort`` ends a collective that waits for a rank which is gone; ``leave`` parts with the others.
    """

    rank: int
    ranks: int
    all_reduce: AllReduce
    communicator: Any = None
    abort: Callable[[], None] = lambda: None
    leave: Callable[[], None] = lambda: None


def check_gpus(ranks: int) -> None:
    """Refuse fewer GPUs than ranks; without any the ranks are on the CPU."""
    count = torch.cuda.device_count() if has_cuda() else ranks
    if count < ranks:
        raise UserError(
            f"tensor_parallel is {ranks}, but PyTorch sees {count} GPU{'s' * (count > 1)} here; run on a machine with "
            f"{ranks}, or set tensor_parallel to {1 << count.bit_length() - 1} and build again."
        )


def join(store: dist.Store, rank: int, ranks: int, seconds: float) -> RankGroup:
    """Meet the other ranks at ``store``; a collective that takes longer than ``seconds`` fails."""
    return (_join_nccl if has_cuda() else join_gloo)(store, rank, ranks, timedelta(seconds=seconds))


def _join_nccl(store: dist.Store, rank: int, ranks: int, longest: timedelta) -> RankGroup:
    if dist.is_initialized():
        raise UserError("another divided network is open in this process; close it first, or use another process.")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    # With a device it connects at once, and not in the middle of the first call.
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, timeout=longest, device_id=device)
    group, backend = dist.group.WORLD, dist.group.WORLD._get_backend(device)

    def all_reduce(part: Tensor) -> Tensor:
        total = part.clone()
        group.allreduce([total]).wait()
        return total

    communicator = _capsule(backend._comm_ptr())
    return RankGroup(rank, ranks, all_reduce, communicator, backend.abort, dist.destroy_process_group)


def join_gloo(store: dist.Store, rank: int, ranks: int, longest: timedelta) -> RankGroup:
    options = dist.ProcessGroupGloo._Options()
    options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname=HOST)], longest
    group = dist.ProcessGroupGloo(store, rank, ranks, options)

    def all_reduce(part: Tensor) -> Tensor:
        # Added in the order of the ranks, so that a token's bits do not depend on its place among others.
        parts = [torch.empty_like(part) for _ in range(ranks)]
        group.allgather([parts], [part.contiguous()]).wait()
        return reduce(torch.add, parts)

    return RankGroup(rank, ranks, all_reduce)


def _capsule(pointer: int) -> Any:
    """A C pointer as TensorRT's Python bindings take it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(pointer, None, None)
