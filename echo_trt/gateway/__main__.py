"""``python -m echo_trt.gateway``: the gateway as a process of its own, as the images run it."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from starlette.applications import Starlette

from echo_trt.errors import UserError
from echo_trt.gateway.app import LARGEST_BODY, create_app
from echo_trt.gateway.connections import Connection, most_connections
from echo_trt.serving.protocol import MODEL


def run(
    engine_socket: Annotated[Path, typer.Option(help="The socket of the engine's host.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 9000,
    api_keys_file: Annotated[
        Path | None, typer.Option("--api-keys-file", "--api-keys", help="A file with one API key a line.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be given again. Default: echo.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may ask, * for all; may be given again.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Whether / shows the live page.")] = True,
    largest_body: Annotated[int, typer.Option(min=1, help="Largest request body in bytes.")] = LARGEST_BODY,
    drain_seconds: Annotated[int, typer.Option(min=0, help="How long SIGTERM waits for running answers.")] = 60,
) -> None:
    """Serve OpenAI's API for an engine."""
    names, origins = served_model_name or [MODEL], allowed_origins or []
    app = create_app(engine_socket, api_keys_file, largest_body, names, origins, page)
    server = server_of(app, host=host, port=port, timeout_graceful_shutdown=drain_seconds)
    with suppress(KeyboardInterrupt):  # raised once open answers have ended
        server.run()
    if not server.started:
        raise typer.Exit(1)


def server_of(app: Starlette, **options: Any) -> Server:
    """Make the server of an application. ``options``: uvicorn's."""
    most = most_connections()
    protocol: Any = partial(Connection, most=most)  # uvicorn only calls it; its type asks for a class
    fixed: dict[str, Any] = {
        "loop": "asyncio",  # uvloop would read as much at once as it likes (``connections.READ``)
        "http": protocol,
        "backlog": max(most // 4, 1),  # asyncio accepts so many at once before it counts them
        "log_level": "error",  # its warnings are of what clients send, and any client can send it for ever
        "access_log": False,
        "server_header": False,
    }
    return Server(uvicorn.Config(app, **(fixed | options)))


class Server(uvicorn.Server):
    """uvicorn's server, which ends the streams of viewers before it waits for open answers."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.loaded_app
        while not isinstance(app, Starlette):  # uvicorn's own layers
            app = app.app
        app.state.live.leave()
        await super().shutdown(sockets)


def main() -> None:
    try:
        typer.run(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
