"""Types in which this CPU computes, and in which weights are stored for it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import openvino as ov

_CPU = Path("/proc/cpuinfo")


@cache
def has_bf16() -> bool:
    """Return whether this CPU can run a graph in bf16, for which OpenVINO's attention needs AVX-512.

    Where oneDNN is kept from AVX-512, OpenVINO still says BF16 and crashes in it.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper().startswith(("SSE", "AVX2")):
        return False
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    return not _CPU.exists() or "avx512f" in _CPU.read_text(encoding="utf-8")


@cache
def has_amx() -> bool:
    return has_bf16() and _CPU.exists() and "amx_bf16" in _CPU.read_text(encoding="utf-8")


def cores() -> int:
    """Return on how many cores this process may run, as OpenVINO counts them: two threads of a core are one."""
    cores = (Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in os.sched_getaffinity(0))
    return len({core.read_text("utf-8") if core.exists() else str(core) for core in cores})


def compute_type(precision: str) -> ov.Type:
    """Return the type of arithmetic and KV cache: bf16, or fp32 where this CPU has none."""
    return ov.Type.f32 if precision == "fp32" or not has_bf16() else ov.Type.bf16


def stores_fp16(precision: str) -> bool:
    """Return whether bf16 weights are stored in fp16, for arithmetic in fp32."""
    return precision == "bf16" and not has_bf16()
