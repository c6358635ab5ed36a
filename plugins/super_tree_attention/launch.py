"""Launches of compiled kernels through the CUDA driver (cuda-python), on a given stream."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from cuda.bindings import driver

_STATIC_SHARED = 48 * 1024  # bytes of shared memory that a kernel gets without asking


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
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, most, shared), "cuFuncSetAttribute")
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
