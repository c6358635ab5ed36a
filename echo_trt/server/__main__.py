"""``python -m echo_trt.server``: the API server as a process of its own, as the images run it."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from cyclopts import Parameter
from starlette.applications import Starlette

from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.options import LogFormat, Port, bounds, command, run_alone
from echo_trt.engine.service import MODEL
from echo_trt.files.log import configure
from echo_trt.server.app import LARGEST_BODY, create_app
from echo_trt.server.connections import ConnectionSlots, HttpConnection, max_connections
from echo_trt.server.options import ApiOptions


@dataclass(frozen=True, kw_only=True)
class ServerOptions(ApiOptions):
    """What the API server's process is asked to do."""

    engine_socket: Annotated[Path, Parameter(help="The socket of the engine's host.")]
    bundle: Annotated[Path | None, Parameter(help="The engine's, read while it starts. Default: as it says.")] = None
    log_format: LogFormat = "text"
    port: Annotated[Port, Parameter(help="Port to listen on.")] = 9000
    largest_body: Annotated[int, Parameter(help="Largest request body in bytes.", validator=bounds(1))] = LARGEST_BODY
    drain_seconds: Annotated[
        int, Parameter(help="How long SIGTERM waits for running answers.", validator=bounds(0))
    ] = 60
    latency_classes: Annotated[str | None, Parameter(help="The engine's, which keys may have. Default: any.")] = None
    liveness_socket: Annotated[
        Path | None, Parameter(help="A socket that tells a supervisor, beside all clients, that this process works.")
    ] = None


@command
def run(options: ServerOptions) -> int:
    """Serve OpenAI's API for an engine."""
    configure("server", options.log_format)
    names, origins = list(options.served_model_names) or [MODEL], list(options.allowed_origins)
    classes = None if options.latency_classes is None else list(LatencyClasses(options.latency_classes))
    given = options.api_keys, options.largest_body, names, origins, options.page, options.hosts, classes
    app = create_app(options.engine_socket, *given, options.request_log, options.strict_fields, options.bundle)
    more: dict[str, Any] = {"host": options.host, "timeout_graceful_shutdown": options.drain_seconds}
    server = server_of(app, options.liveness_socket, port=options.port, **more)
    with suppress(KeyboardInterrupt):  # raised once requests in flight have ended
        server.run()
    return 0 if server.started else 1


def server_of(
    app: Starlette, liveness: Path | None = None, slots: ConnectionSlots | None = None, **options: Any
) -> DrainingServer:
    slots = slots or ConnectionSlots(max_connections())
    metrics = getattr(app.state, "metrics", None)
    if metrics is not None:
        metrics.connections.set_function(partial(len, slots))
        metrics.max_connections.set(slots.limit)
    protocol: Any = partial(HttpConnection, slots=slots)  # uvicorn only calls it; its type asks for a class
    fixed: dict[str, Any] = {
        "loop": "asyncio",  # uvloop would read as much at once as it likes (``connections.READ``)
        "http": protocol,
        "backlog": max(slots.limit // 4, 1),  # asyncio accepts so many at once before it counts them
        "log_level": "error",  # its warnings are of what clients send, and any client can send it for ever
        "access_log": False,
        "log_config": None,  # its lines have the form of all others
        "server_header": False,
    }
    return DrainingServer(uvicorn.Config(app, **(fixed | options)), app, liveness)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which ends the streams of viewers before it waits for requests in flight.

    Who connects at ``liveness``, a path, is sent a byte: no crowd of clients can be in the way.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, liveness: Path | None):
        super().__init__(config)
        self._app, self._liveness = app, liveness

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._liveness:
            self.servers.append(await asyncio.start_unix_server(_tell, self._liveness))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        live = getattr(self._app.state, "live", None)  # another application, or one that did not start, has no viewers
        if live is not None:
            live.leave()
        await super().shutdown(sockets)


async def _tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b".")
    writer.close()


if __name__ == "__main__":
    run_alone(run)
