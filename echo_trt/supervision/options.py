"""The options of ``echo-trt serve``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.options import DrainSeconds, Flag, HostedOptions, LogFormat, Port, bounds
from echo_trt.server.options import ApiOptions

TRITON_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ApiOptions, HostedOptions):
    """What ``serve`` is asked to do. ``openai_port`` 0: no API server."""

    http_port: Annotated[Port | None, Parameter(help="Triton's HTTP endpoint, with --triton. Default: 8000.")] = None
    grpc_port: Annotated[Port | None, Parameter(help="Triton's gRPC endpoint, with --triton. Default: 8001.")] = None
    metrics_port: Annotated[Port | None, Parameter(help="Triton's metrics, with --triton. Default: 8002.")] = None
    openai_port: Annotated[
        int,
        Parameter(("--openai-port", "--port"), help="The OpenAI-compatible API; 0 is off.", validator=bounds(0, 65535)),
    ] = 9000
    start_seconds: Annotated[
        int, Parameter("--start-timeout", help="Seconds until the first answer, at most.", validator=bounds(1))
    ] = 300
    drain_seconds: DrainSeconds = 60
    triton: Annotated[
        Flag, Parameter(help="Let Triton Inference Server host the engine, with Triton's own HTTP and gRPC.")
    ] = False
    log_format: LogFormat = "text"
    replicas: Annotated[
        int,
        Parameter(
            help="Workers behind NVIDIA Dynamo's frontend at --openai-port; 0: one engine, no Dynamo.",
            validator=bounds(0),
        ),
    ] = 0

    def keeping_costs(self, work: Path) -> ServeOptions:
        """Let costs that a read-only bundle cannot keep outlive an engine: in ``work``, until this server ends."""
        return self if self.costs or os.access(self.bundle, os.W_OK) else replace(self, costs=work / "costs.json")

    @property
    def given_triton_ports(self) -> list[str]:
        """Options of Triton's ports that are on the command line."""
        return [f"--{name}-port" for name in TRITON_PORTS if getattr(self, f"{name}_port") is not None]

    @property
    def triton_ports(self) -> dict[str, int]:
        return {name: getattr(self, f"{name}_port") or port for name, port in TRITON_PORTS.items()}

    @property
    def ports(self) -> dict[str, int]:
        triton = {f"--{name}-port": port for name, port in self.triton_ports.items()} if self.triton else {}
        return triton | ({"--openai-port": self.openai_port} if self.openai_port else {})

    @property
    def model_name(self) -> str:
        """What clients call the model where it has one name."""
        return (*self.served_model_names, "echo")[0]

    @property
    def reached_at(self) -> str:
        """The address for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def openai_url(self) -> str:
        return f"http://{self.reached_at}:{self.openai_port}"

    @property
    def shown_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host
