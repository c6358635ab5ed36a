"""The CUDA device under an engine, and its free memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from echo_trt.errors import UserError

GIB = 2**30
#: Of the attention kernel, whose tiles are powers of two, of 16 rows or more.
HEAD_DIMS, MAX_GROUP = (16, 32, 64, 128, 256), 16


def cuda_device() -> torch.device:
    """Return the current CUDA device, or refuse with PyTorch's reason for having none."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise UserError(
            f"no CUDA device: PyTorch {torch.__version__} says {reason!r}; run on a machine with an NVIDIA GPU, its "
            "driver and a CUDA build of PyTorch, or build with --engine cpu."
        ) from error
    return torch.device("cuda", torch.cuda.current_device())


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device_count() -> int:
    return torch.cuda.device_count() if has_cuda() else 0


def device_name() -> str:
    """Return the name of the current CUDA device; empty without one."""
    return torch.cuda.get_device_name() if has_cuda() else ""


def check_heads(head_dim: int, group: int) -> None:
    """Refuse a network whose heads, or ``group`` query heads per KV head, the attention kernel is not for."""
    if head_dim not in HEAD_DIMS or group > MAX_GROUP:
        raise UserError(
            f"the network has heads of {head_dim} and {group} query heads a KV head, but the kernel for GPUs is for "
            f"heads of {', '.join(map(str, HEAD_DIMS))} and up to {MAX_GROUP}; build it with --engine cpu."
        )


@contextmanager
def launching_kernels() -> Iterator[None]:
    """Say what to install where Triton cannot compile what launches its kernels, as it does at first launches."""
    try:
        yield
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        remedy = "install gcc and python3-dev, or name a compiler in CC"
        raise UserError(f"Triton finds no C compiler, by which it launches kernels; {remedy}.") from error


def own_stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """Make a stream that ends with ``owner``. PyTorch hands out 32 in turn, so two engines may get the same."""
    from cuda.bindings import runtime

    with torch.cuda.device(device):
        error, stream = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
    if stream is None:
        raise UserError(f"CUDA makes no stream ({error.name}); restart the process, or the machine if that lasts.")
    # Not at the process's end, when CUDA may be gone before.
    weakref.finalize(owner, runtime.cudaStreamDestroy, stream).atexit = False
    return torch.cuda.ExternalStream(int(stream), device)


def compute_capability(device: torch.device) -> str:
    """Return a device's compute capability, such as 8.9."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def check_room(device: torch.device, needed: int, name: str, remedy: str) -> None:
    """Refuse to allocate ``needed`` bytes for ``name`` where the device has less, and say how much is missing."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise UserError(missing(needed, free, torch.cuda.get_device_name(device), name, remedy))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str) -> torch.Tensor:
    """Make a tensor of zeros whose size follows the KV blocks; refuse, by ``name``, where a GPU has no room for it."""
    if device.type == "cuda":
        check_room(device, math.prod(shape) * dtype.itemsize, name, "lower limits.kv_blocks")
    return torch.zeros(shape, dtype=dtype, device=device)


def missing(needed: int, free: int, device: str, name: str, remedy: str) -> str:
    return (
        f"{name} needs {needed / GIB:.1f} GiB, but {device} has {free / GIB:.1f} GiB free, "
        f"{(needed - free) / GIB:.1f} GiB too little; {remedy}."
    )
