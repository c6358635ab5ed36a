"""The options of ``echo-trt worker``."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.options import DrainSeconds, LatencyOptions, bounds


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(LatencyOptions):
    """What ``worker`` is asked to do."""

    name: Annotated[str, Parameter(help="What clients call the model. Default: the bundle's name.")] = ""
    queue: Annotated[int, Parameter(help="Requests that may wait; more go to other workers.", validator=bounds(1))] = (
        256
    )
    drain_seconds: DrainSeconds = 60
    system_port: Annotated[
        int, Parameter(help="Metrics and health; 0: DYN_SYSTEM_PORT, else none.", validator=bounds(0, 32767))
    ] = 0
    tool_call_parser: Annotated[str | None, Parameter(help="Dynamo's parser of tool calls, such as hermes.")] = None
    reasoning_parser: Annotated[str | None, Parameter(help="Dynamo's parser of thoughts, such as qwen3.")] = None

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
