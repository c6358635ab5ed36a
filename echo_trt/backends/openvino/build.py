"""A role to the file of an OpenVINO engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from echo_trt.backends.kind import CompiledRole
from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.backends.openvino.export import export_parted
from echo_trt.backends.openvino.quantise import quantise
from echo_trt.models.roles import Role


def compile_role(role: Role, path: Path, precision: str) -> CompiledRole:
    """Export ``role`` to ``path``, with weights in ``precision``."""
    export_parted(role, path)
    if precision in ("int8", "int4"):
        quantise(path, precision)
    return CompiledRole(path.name, partial(OpenVINOEngine, path, precision))
