"""``echo-trt store``: what ``serve --store`` keeps in a folder, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from echo_trt.cli.terminal import messages
from echo_trt.engine.host_memory import gigabytes
from echo_trt.files import store

app = App(name="store", help="Show or empty the folder of serve --store.", help_format="plaintext")
Folder = Annotated[Path, Parameter(help="The folder that serve --store was given.")]


@app.command
def inspect(folder: Folder, /) -> None:
    """List what a store holds, by what it belongs to: a bundle, a version and a machine. A server may have it open."""
    for scope, name, count, size in store.inspect(folder):
        print(f"{scope[:12].lower()}  {count:>8,} {name:24} {gigabytes(size)}")


@app.command
def clear(folder: Folder, /) -> None:
    """Delete all that a store holds; no server may have it open."""
    store.clear(folder)
    messages.print(f"{folder} is empty.")
