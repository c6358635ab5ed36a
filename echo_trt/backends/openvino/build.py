"""A role to the file of an OpenVINO engine, checked against the reference."""

from __future__ import annotations

from pathlib import Path

from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.backends.openvino.export import export_parted
from echo_trt.backends.openvino.quantise import quantise
from echo_trt.backends.self_check import check_engine, write_text
from echo_trt.bundle.manifest import SelfCheck
from echo_trt.models.roles import Role, TargetModule
from echo_trt.models.weights import release_weights


def compile_role(role: Role, path: Path, precision: str) -> tuple[str, SelfCheck]:
    """Export ``role`` to ``path``; returns the file's name, and the self-check."""
    export_parted(role, path)
    text = None
    if precision in ("int8", "int4"):
        quantise(path, precision)
        text = write_text(role) if isinstance(role, TargetModule) else None

    def opened(blocks: int) -> OpenVINOEngine:
        release_weights(role)
        return OpenVINOEngine(path, precision, blocks)

    return path.name, check_engine(role, opened, precision, text=text)
