"""A role to the file of an OpenVINO engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from echo_trt.backends.kind import CompiledRole
from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.backends.openvino.export import export_parted
from echo_trt.models.roles import Role


def compile_role(role: Role, path: Path, precision: str) -> CompiledRole:
    """Export ``role`` to ``path``."""
    export_parted(role, path)
    return CompiledRole(path.name, partial(OpenVINOEngine, path, precision))
