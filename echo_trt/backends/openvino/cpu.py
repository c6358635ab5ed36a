"""What this CPU computes in, and how weights are stored for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import openvino as ov

from echo_trt.bundle.manifest import Manifest

_CPU = Path("/proc/cpuinfo")


@cache
def has_bf16() -> bool:
    """Whether this CPU can run a graph in bf16. OpenVINO's attention takes AVX-512 for it, its other kernels less."""
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    return not _CPU.exists() or "avx512f" in _CPU.read_text(encoding="utf-8")


@cache
def has_amx() -> bool:
    """Whether this CPU has matrix units for bf16."""
    return has_bf16() and _CPU.exists() and "amx_bf16" in _CPU.read_text(encoding="utf-8")


def compute_type(precision: str) -> ov.Type:
    """That of arithmetic and KV cache on this CPU: bf16, which int8's activations are too, falls back to fp32."""
    return ov.Type.f32 if precision == "fp32" or not has_bf16() else ov.Type.bf16


def stores_fp16(precision: str) -> bool:
    """Whether weights keep bf16's two bytes as fp16, for arithmetic in fp32."""
    return precision == "bf16" and not has_bf16()


def computes_in(manifest: Manifest) -> str:
    """Return a bundle's precision, or its replacement here: OpenVINO has no bf16 on a CPU without AVX-512."""
    engine, precision = manifest.engine, manifest.precision
    return "fp32" if engine == "openvino" and stores_fp16(precision) else precision
