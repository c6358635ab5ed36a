"""Load on servers, old beside new: ``--help`` tells how; the code is ``echo_trt_lab.load``."""

import typer

from echo_trt_lab.load import __doc__ as about
from echo_trt_lab.load import main

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=about)(main)
    app()
