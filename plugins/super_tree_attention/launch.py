"""Launches of compiled kernels through the CUDA driver (cuda-python), which need no C compiler."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from super_tree_attention.ahead_of_time import HEAD_DIMS, compile_kernel

_STATIC_SHARED = 48 * 1024  # bytes of shared memory that a kernel gets without asking
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class CudaError(RuntimeError):
    """A failed driver call: its name, the error's name and the driver's explanation."""


def check(result: tuple[Any, ...], call: str) -> Any:
    """Return the values of a driver call's result: none, one, or a tuple of them."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        _, text = driver.cuGetErrorString(error)
        raise CudaError(f"{call}: {(name or b'unknown').decode()} ({(text or b'').decode()})")
    return values[0] if len(values) == 1 else tuple(values) or None


@cache
def device_facts() -> tuple[int, int]:
    """Return the compute capability for kernels, such as 90, and the streaming multiprocessors of the current device.

    Without a current context it is the first device.
    """
    check(driver.cuInit(0), "cuInit")
    error, device = driver.cuCtxGetDevice()
    if error != driver.CUresult.CUDA_SUCCESS:
        device = check(driver.cuDeviceGet(0), "cuDeviceGet")
    kinds = driver.CUdevice_attribute
    major, minor, processors = (
        check(driver.cuDeviceGetAttribute(kind, device), "cuDeviceGetAttribute")
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    capability = 10 * major + minor
    return (80 if capability in (86, 87) else capability), processors  # 8.6 and 8.7 run kernels for 8.0


@cache
def load(cubin: bytes, name: str, shared: int) -> Any:
    """Load the function ``name`` of a cubin, with ``shared`` bytes of shared memory, into the current context."""
    module = check(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
    function = check(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction")
    if shared > _STATIC_SHARED:
        maximum = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, maximum, shared), "cuFuncSetAttribute")
    return function


def launch(
    function: Any, grid: tuple[int, int, int], threads: int, shared: int, stream: int,
    pointers: list[int], integers: list[int], results: list[int],
) -> None:  # fmt: skip
    """Enqueue one kernel; its arguments are ``pointers``, int32 ``integers``, and pointers to ``results``."""
    values = (*pointers, *integers, *results)
    kinds = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int32,) * len(integers) + (ctypes.c_void_p,) * len(results)
    launched = driver.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, (values, kinds), 0)
    check(launched, "cuLaunchKernel")


def can_move(pools: Tensor) -> bool:
    """Return whether there are compiled kernels for ``pools``, [L2, num_blocks, Hk, block, D]."""
    return pools.dtype in _TYPES and pools.shape[-1] in HEAD_DIMS


def move_rows(pools: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy rows source[j] to target[j] in every pool, as ``triton_attention.move_rows``, on the current stream.

    pools           fp16 or bf16 [L2, num_blocks, Hk, block, D], contiguous, D as in HEAD_DIMS
    source, target  int32 or int64 [m]
    """
    layers, num_blocks, kv_heads, block, head_dim = pools.shape
    if not len(source):
        return
    source, target = source.long(), target.long()
    rows = pools.new_empty((layers, len(source), kv_heads, head_dim))
    stream = torch.cuda.current_stream(pools.device).cuda_stream
    capability, _ = device_facts()
    for kind, read, written in (("gather_rows", pools, rows), ("scatter_rows", rows, pools)):
        kernel = compile_kernel(kind, capability, _TYPES[pools.dtype], head_dim, block=block)
        pointers = [tensor.data_ptr() for tensor in (read, written, source, target)]
        function, grid = load(kernel.cubin, kernel.name, kernel.shared), (len(source), layers, 1)
        # Two null pointers: Triton's scratch memory, of no size.
        launch(function, grid, kernel.threads, kernel.shared, stream, pointers, [kv_heads, num_blocks], [0, 0])
